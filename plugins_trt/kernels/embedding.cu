// SPDX-License-Identifier: Apache-2.0
// starkv_embedding_gather: rows of a table by their ids.

#include "host.h"
#include "platform.h"

namespace starkv {
namespace {

constexpr int kGatherThreads = 256;

// Grid: ids. Rows are copied in units that divide them.
template <class Unit>
__global__ void gather_rows(const void* table, const int32_t* ids, void* out, int vocabulary, int units) {
    const int id = ids[blockIdx.x];
    const auto* from = static_cast<const Unit*>(table) + static_cast<size_t>(id) * units;
    auto* to = static_cast<Unit*>(out) + static_cast<size_t>(blockIdx.x) * units;
    const bool known = id >= 0 && id < vocabulary;
    for (int i = static_cast<int>(threadIdx.x); i < units; i += kGatherThreads)
        to[i] = known ? from[i] : Unit{};
}

template <class Unit>
bool gather(const void* table, const int32_t* ids, void* out, int count, int vocabulary, size_t row_bytes,
            Stream stream) {
    return launch(gather_rows<Unit>, static_cast<unsigned>(count), kGatherThreads, 0, stream, table, ids, out,
                  vocabulary, static_cast<int>(row_bytes / sizeof(Unit)));
}

}  // namespace
}  // namespace starkv

int starkv_embedding_gather(const void* table, const int32_t* ids, void* out, int32_t count,
                            int32_t vocabulary, int32_t width, int32_t dtype, void* stream) {
    if (starkv::any_null({table, ids, out})) return STARKV_ERROR_NULL_POINTER;
    if (starkv::any_misaligned({table, ids, out})) return STARKV_ERROR_MISALIGNED;
    if (dtype < STARKV_FLOAT32 || dtype > STARKV_BFLOAT16) return STARKV_ERROR_DTYPE;
    if (count < 1 || vocabulary < 1 || width < 1) return STARKV_ERROR_SHAPE;
    const size_t row_bytes = static_cast<size_t>(width) * starkv::element_bytes(dtype);
    const auto on = static_cast<starkv::Stream>(stream);
    const bool launched = row_bytes % sizeof(uint4) == 0
                              ? starkv::gather<uint4>(table, ids, out, count, vocabulary, row_bytes, on)
                              : starkv::gather<uint16_t>(table, ids, out, count, vocabulary, row_bytes, on);
    return launched ? STARKV_OK : STARKV_ERROR_LAUNCH;
}
