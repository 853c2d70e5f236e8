// SPDX-License-Identifier: Apache-2.0
// starkv_argmax and starkv_sample_top_p: checks and launches.

#include "host.h"
#include "sampling.cuh"

namespace starkv {
namespace {

// Sums of so many weights fit 64 bits.
constexpr int kMostTokens = 1 << 22;

int check_logits(std::initializer_list<const void*> pointers, int32_t sequences, int32_t vocabulary) {
    if (any_null(pointers)) return STARKV_ERROR_NULL_POINTER;
    if (any_misaligned(pointers)) return STARKV_ERROR_MISALIGNED;
    return sequences < 1 || vocabulary < 1 || vocabulary > kMostTokens ? STARKV_ERROR_SHAPE : STARKV_OK;
}

}  // namespace
}  // namespace starkv

int starkv_argmax(const float* logits, int32_t* ids, int32_t sequences, int32_t vocabulary, void* stream) {
    const int status = starkv::check_logits({logits, ids}, sequences, vocabulary);
    if (status != STARKV_OK) return status;
    const size_t shared = sizeof(starkv::BlockScratch<starkv::Mass>);
    const bool launched =
        starkv::launch(starkv::argmax_tokens, static_cast<unsigned>(sequences), starkv::kSamplingThreads,
                       shared, static_cast<starkv::Stream>(stream), logits, ids, vocabulary);
    return launched ? STARKV_OK : STARKV_ERROR_LAUNCH;
}

int starkv_sample_top_p(const float* logits, const float* temperature, const float* top_p,
                        const float* uniform, int32_t* ids, int32_t sequences, int32_t vocabulary,
                        void* stream) {
    const int status =
        starkv::check_logits({logits, temperature, top_p, uniform, ids}, sequences, vocabulary);
    if (status != STARKV_OK) return status;
    const bool launched =
        starkv::launch(starkv::sample_tokens, static_cast<unsigned>(sequences), starkv::kSamplingThreads,
                       sizeof(starkv::SamplingShared), static_cast<starkv::Stream>(stream), logits,
                       temperature, top_p, uniform, ids, vocabulary);
    return launched ? STARKV_OK : STARKV_ERROR_LAUNCH;
}
