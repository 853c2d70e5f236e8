// SPDX-License-Identifier: Apache-2.0
// Queries in shared memory as the tensor cores take them, for products with keys that come straight from
// memory.
//
// A product over D does not care in which order it is summed, so both operands are permuted alike: a thread
// reads 16 consecutive bytes of a key and uses them for two steps, instead of the scattered elements that
// their layout (mma.h) names.
#pragma once

#include "mma.h"

namespace starkv {

constexpr int kQueryTileRows = 16;

// Up to 16 * kTiles queries: 16 bytes of a thread for each step. Those behind the last are 0.
template <class T, int kDim, int kTiles>
struct QueryFragments {
    static constexpr int kSteps = kDim / 16;
    uint4 parts[kTiles][kSteps][kWarp];

    // First of the four elements of a row that a thread contributes to a step.
    __device__ static int element(int step, int thread) {
        const bool paired = step < kDim / 32 * 2;
        return paired ? step / 2 * 32 + thread * 8 + step % 2 * 4 : step * 16 + thread * 4;
    }

    __device__ void load(const T* queries, int count) {
        constexpr int kParts = kTiles * kSteps * kWarp;
        for (int i = static_cast<int>(threadIdx.x); i < kParts; i += static_cast<int>(blockDim.x)) {
            const int lane = i % kWarp, step = i / kWarp % kSteps, tile = i / kWarp / kSteps;
            const int query = tile * kQueryTileRows + lane / 4, offset = element(step, lane % 4);
            const auto four = [&](int row) {
                const auto* from = reinterpret_cast<const uint2*>(queries + row * kDim + offset);
                return row < count ? *from : make_uint2(0, 0);
            };
            const uint2 upper = four(query), lower = four(query + 8);
            parts[tile][step][lane] = make_uint4(upper.x, lower.x, upper.y, lower.y);
        }
    }
};

// float32 is for products without tensor cores: rows, each followed by 16 unused bytes that spread them over
// the banks.
template <int kDim, int kTiles>
struct QueryFragments<float, kDim, kTiles> {
    static constexpr int kRows = kTiles * kQueryTileRows;
    alignas(16) float rows[kRows][kDim + 4];

    __device__ void load(const float* queries, int count) {
        for (int i = static_cast<int>(threadIdx.x); i < kRows * kDim; i += static_cast<int>(blockDim.x))
            rows[i / kDim][i % kDim] = i / kDim < count ? queries[i] : 0.0F;
    }
};

}  // namespace starkv
