// SPDX-License-Identifier: Apache-2.0
// Softmax over scores that arrive in parts, and the arithmetic around it.
#pragma once

#include <cfloat>

#include "elements.h"
#include "softmax_sum.h"

namespace starkv {

// pack() in one instruction.
template <class T>
__device__ uint32_t pack_fast(float first, float second);

template <>
__device__ inline uint32_t pack_fast<BFloat16>(float first, float second) {
#if STARKV_CPU
    return pack<BFloat16>(first, second);
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#endif
}
template <>
__device__ inline uint32_t pack_fast<Half>(float first, float second) {
#if STARKV_CPU
    return pack<Half>(first, second);
#else
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#endif
}

// Factor of products of queries and keys that makes powers of two of their softmax's exponentials.
__device__ inline float score_scale(int dim) { return kLog2E / sqrtf(static_cast<float>(dim)); }

// Of one query: the largest score so far, and the sum of weights 2^(score - greatest). Starts from the lowest
// number instead of -infinity, whose distance to itself is no number.
struct RunningSoftmax {
    float greatest = -FLT_MAX;
    float sum = 0.0F;

    // Takes the largest of new products; gives the factor of everything weighed before.
    __device__ float raise(float product, float scale) {
        const float larger = fmaxf(greatest, product * scale);
        const float factor = power_of_two(greatest - larger);
        greatest = larger;
        sum *= factor;
        return factor;
    }
    __device__ float weigh(float product, float scale) {
        const float weight = power_of_two(fmaf(product, scale, -greatest));
        sum += weight;
        return weight;
    }
};

}  // namespace starkv
