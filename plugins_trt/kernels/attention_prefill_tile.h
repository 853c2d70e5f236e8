// SPDX-License-Identifier: Apache-2.0
// One warp's queries against a tile of rows in shared memory.
#pragma once

#include "attention_view.h"
#include "load_matrix.h"
#include "mma.h"
#include "running_softmax.h"

namespace starkv {

// Rows of one tile, of which a warp's products are held in registers at once.
constexpr int kPrefillRows = 64;

template <class T, int kDim>
struct PrefillShared {
    // Query tiles of 16 of one warp. Two use every key and value that is read from shared memory twice; wider
    // heads leave registers for one.
    static constexpr int kTiles = kDim <= 128 ? 2 : 1;
    static constexpr int kQueries = kAttentionWarps * kTiles * 16;
    // An odd number of 16 bytes: eight rows that are read at once lie on different banks.
    static constexpr int kStride = kDim + 8;
    alignas(16) T queries[kQueries][kStride];
    alignas(16) T keys[kPrefillRows][kStride];
    alignas(16) T values[kPrefillRows][kStride];
};

// Queries of one warp, and what they gathered so far. With g = lane / 4 and t = lane % 4 a thread holds of
// every tile of 16 queries the rows g and g + 8, and of every 8 columns 2t and 2t + 1, as multiply_add() lays
// them out.
template <class T, int kDim>
struct PrefillState {
    using Shared = PrefillShared<T, kDim>;
    static constexpr int kTiles = Shared::kTiles;
    static constexpr int kSteps = kPrefillRows / 16;
    using Products = float[kTiles][kPrefillRows / 8][4];

    RunningSoftmax softmax[kTiles][2];
    float out[kTiles][kDim / 8][4];

    __device__ PrefillState() {
#pragma unroll
        for (auto& tile : out)
#pragma unroll
            for (auto& columns : tile)
#pragma unroll
                for (float& sum : columns) sum = 0.0F;
    }

    static __device__ int first_query() { return warp_index() * kTiles * 16; }

    // Products with the keys of a tile.
    static __device__ void multiply_keys(const Shared& shared, Products& products) {
#pragma unroll
        for (auto& tile : products)
#pragma unroll
            for (auto& keys : tile)
#pragma unroll
                for (float& product : keys) product = 0.0F;
#pragma unroll
        for (int column = 0; column < kDim; column += 16) {
            uint32_t queries[kTiles][4];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
                load_matrix(queries[tile],
                            row_parts(&shared.queries[first_query() + tile * 16][column], Shared::kStride));
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                uint32_t keys[4];
                load_matrix(keys, column_parts(&shared.keys[step * 16][column], Shared::kStride));
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    multiply_add<T>(products[tile][2 * step], queries[tile], {keys[0], keys[1]});
                    multiply_add<T>(products[tile][2 * step + 1], queries[tile], {keys[2], keys[3]});
                }
            }
        }
    }

    // Hides rows of a tile: the block's query q sees those up to visible + q.
    static __device__ void mask(Products& products, int visible) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int query = first_query() + tile * 16 + i / 2 * 8 + lane_index() / 4;
                const int last = visible + query - lane_index() % 4 * 2 - i % 2;
#pragma unroll
                for (int n = 0; n < kPrefillRows / 8; ++n)
                    if (n * 8 > last) products[tile][n][i] = -INFINITY;
            }
    }

    // Hides a tile's rows from `count` on, from all queries.
    static __device__ void hide_from(Products& products, int count) {
#pragma unroll
        for (auto& tile : products)
#pragma unroll
            for (int n = 0; n < kPrefillRows / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (n * 8 + lane_index() % 4 * 2 + i % 2 >= count) tile[n][i] = -INFINITY;
    }

    // Turns products into weights and scales what was gathered before.
    __device__ void weigh(Products& products) {
        const float scale = score_scale(kDim);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float greatest = -INFINITY;
#pragma unroll
                for (const auto& keys : products[tile])
                    greatest = fmaxf(greatest, fmaxf(keys[2 * half], keys[2 * half + 1]));
                greatest = fmaxf(greatest, shfl_xor(greatest, 1));
                greatest = fmaxf(greatest, shfl_xor(greatest, 2));
                const float factor = softmax[tile][half].raise(greatest, scale);
#pragma unroll
                for (auto& columns : out[tile]) {
                    columns[2 * half] *= factor;
                    columns[2 * half + 1] *= factor;
                }
#pragma unroll
                for (auto& keys : products[tile]) {
                    keys[2 * half] = softmax[tile][half].weigh(keys[2 * half], scale);
                    keys[2 * half + 1] = softmax[tile][half].weigh(keys[2 * half + 1], scale);
                }
            }
    }

    // Adds the values of a tile. Two neighbouring results of 8 keys are one operand of 16.
    __device__ void multiply_values(const Shared& shared, const Products& weights) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t packed[kTiles][4];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const auto& pair = weights[tile][2 * step + i / 2];
                    packed[tile][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
                }
#pragma unroll
            for (int column = 0; column < kDim; column += 16) {
                uint32_t values[4];
                load_matrix_transposed(values, row_parts(&shared.values[step * 16][column], Shared::kStride));
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    multiply_add<T>(out[tile][column / 8], packed[tile], {values[0], values[1]});
                    multiply_add<T>(out[tile][column / 8 + 1], packed[tile], {values[2], values[3]});
                }
            }
        }
    }

    // Leaves the result where the warp's queries were.
    __device__ void finish(Shared& shared) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sum = softmax[tile][half].sum;
                sum += shfl_xor(sum, 1);
                sum += shfl_xor(sum, 2);
                const float share = 1.0F / sum;
                T* row = shared.queries[first_query() + tile * 16 + half * 8 + lane_index() / 4];
#pragma unroll
                for (int n = 0; n < kDim / 8; ++n) {
                    const float* columns = out[tile][n] + 2 * half;
                    *reinterpret_cast<uint32_t*>(row + n * 8 + lane_index() % 4 * 2) =
                        pack<T>(columns[0] * share, columns[1] * share);
                }
            }
        __syncwarp();
    }
};

}  // namespace starkv
