// SPDX-License-Identifier: Apache-2.0
// The softmax's statistics of some scores, in one pass and joined with those of others. Scores are in units
// of ln 2, since the hardware knows powers of two only.
#pragma once

#include "platform.h"

namespace starkv {

constexpr float kLog2E = 1.4426950408889634F;

#if STARKV_CPU
inline float power_of_two(float exponent) { return exp2f(exponent); }
#else
__device__ inline float power_of_two(float exponent) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
    return result;
}
#endif

// Factor of products over D that makes scores of them.
__device__ inline float score_scale(int dim) { return kLog2E / sqrtf(static_cast<float>(dim)); }

struct SoftmaxSum {
    float greatest;
    float sum;  // of 2^(score - greatest)

    // Until a score is seen, differences to -inf must not become NaN; a score that is NaN makes the sum NaN.
    __device__ static float reference(float greatest) { return greatest == -INFINITY ? 0.0F : greatest; }

    template <int kCount>
    __device__ void add(const float (&scores)[kCount]) {
        float larger = greatest;
#pragma unroll
        for (const float score : scores) larger = fmaxf(larger, score);
        const float base = reference(larger);
        sum *= power_of_two(greatest - base);
#pragma unroll
        for (const float score : scores) sum += power_of_two(score - base);
        greatest = larger;
    }
    __device__ void join(SoftmaxSum other) {
        const float larger = fmaxf(greatest, other.greatest), base = reference(larger);
        sum = sum * power_of_two(greatest - base) + other.sum * power_of_two(other.greatest - base);
        greatest = larger;
    }
};

}  // namespace starkv
