// SPDX-License-Identifier: Apache-2.0
// The softmax's statistics of some scores, in one pass and joined with those of others.
#pragma once

#include "platform.h"

namespace starkv {

struct SoftmaxSum {
    float greatest;
    float sum;  // of exp(score - greatest)

    __device__ void add(float score_a, float score_b) {
        const float larger = fmaxf(greatest, fmaxf(score_a, score_b));
        // Nothing seen yet; but what is no number must not get lost.
        if (larger == -INFINITY && score_a == score_a && score_b == score_b) return;
        sum = sum * expf(greatest - larger) + expf(score_a - larger) + expf(score_b - larger);
        greatest = larger;
    }
    __device__ void join(SoftmaxSum other) {
        const float larger = fmaxf(greatest, other.greatest);
        if (larger == -INFINITY) {
            sum += other.sum;
            return;
        }
        sum = sum * expf(greatest - larger) + other.sum * expf(other.greatest - larger);
        greatest = larger;
    }
};

}  // namespace starkv
