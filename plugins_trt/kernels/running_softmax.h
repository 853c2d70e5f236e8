// SPDX-License-Identifier: Apache-2.0
// Softmax over scores that arrive in parts, and the arithmetic around it.
#pragma once

#include <cfloat>

#include "elements.h"
#include "softmax_sum.h"

namespace starkv {

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
