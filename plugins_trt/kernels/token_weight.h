// SPDX-License-Identifier: Apache-2.0
// Weights of tokens as integers, so that their sums are exact in any order and sampling gives the same token
// on every device. starkv/kernels/sampling_reference.py does the same in PyTorch.
#pragma once

#include "elements.h"

namespace starkv {

using Mass = unsigned long long;

// Weights are multiples of 2^-40 of the largest one.
constexpr int kWeightBits = 40;

// e^-distance in units of 2^-40, 1 at 0; 0 from where it is below half a unit, and for what is no number.
__device__ inline Mass token_weight(float distance) {
    constexpr float kFarthest = 29.0F;
    constexpr float kDistanceUnit = 1.0F / (1 << 26);
    constexpr uint64_t kLog2E = 1549082005;  // in units of 2^-30
    // 2^-x for x in [0, 1] as a polynomial fitted at Chebyshev nodes, within 2^-26; signs alternate.
    constexpr uint32_t kPowers[] = {2147483648U, 1488522224U, 515881616U, 119183792U,
                                    20609765U,   2774099U,    246920U};
    constexpr int kDegree = 6, kFractionBits = 31;
    if (!(distance < kFarthest)) return 0;
    const auto units = static_cast<uint32_t>(rintf(distance / kDistanceUnit));
    const uint64_t exponent = units * kLog2E;  // in units of 2^-56
    const auto fraction =
        static_cast<uint32_t>(exponent >> (56 - kFractionBits)) & ((1U << kFractionBits) - 1);
    uint32_t power = kPowers[kDegree];
#pragma unroll
    for (int i = kDegree - 1; i >= 0; --i)
        power = kPowers[i] - static_cast<uint32_t>(static_cast<uint64_t>(power) * fraction >> kFractionBits);
    const int halvings = static_cast<int>(exponent >> 56);
    const Mass weight = static_cast<Mass>(power) << (kWeightBits - kFractionBits);
    return (weight + ((Mass{1} << halvings) >> 1)) >> halvings;
}

// What orders tokens for argmax: the logit, of equal ones the lower id. What is no number comes last.
__device__ inline Mass token_order(float logit, int id) {
    const uint32_t order = logit == logit ? ordered_key(logit) : 0;
    return static_cast<Mass>(order) << 32 | (0xffffffffU - static_cast<uint32_t>(id));
}
__device__ inline int ordered_token(Mass order) {
    return static_cast<int>(0xffffffffU - static_cast<uint32_t>(order));
}

}  // namespace starkv
