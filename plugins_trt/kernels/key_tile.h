// SPDX-License-Identifier: Apache-2.0
// Products of a block of queries with a tile of keys, by one warp.
//
// Keys go from device memory straight into registers. A product over D does not care in which order it is
// summed, so both operands are permuted alike: a thread reads 16 consecutive bytes of a key and uses them for
// two steps of the tensor cores, instead of the scattered elements that their layout names.
//
// With g = lane / 4 and t = lane % 4 a thread gets scores of queries 16 m + 8 h + g with keys 8 n + 2 t + c, at
// scores[m][n][2 h + c].
#pragma once

#include "compress_view.h"
#include "mma.h"

namespace starkv {

constexpr int kTileRows = 16;
constexpr int kKeyTiles = kTileRows / 8;
constexpr int kQueryTileRows = 16;
constexpr int kQueryTiles = kQueries / kQueryTileRows;

using TileScores = float[kQueryTiles][kKeyTiles][4];

// A block's queries in shared memory as the tensor cores take them: 16 bytes of a thread for each step. Those
// behind the last are 0.
template <class T, int kDim>
struct QueryFragments {
    static constexpr int kSteps = kDim / 16;
    uint4 parts[kQueryTiles][kSteps][kWarp];

    // First of the four elements that a thread takes in a step; see above.
    __device__ static int element(int step, int thread) {
        const int pair = step / 2 * 32;
        return pair + 32 <= kDim ? pair + thread * 8 + step % 2 * 4 : pair + thread * 4;
    }

    __device__ void load(const T* queries, int count) {
        constexpr int kParts = kQueryTiles * kSteps * kWarp;
        for (int i = static_cast<int>(threadIdx.x); i < kParts; i += static_cast<int>(blockDim.x)) {
            const int lane = i % kWarp, step = i / kWarp % kSteps, tile = i / kWarp / kSteps;
            const int query = tile * kQueryTileRows + lane / 4, offset = element(step, lane % 4);
            const auto four = [&](int row) {
                return row < count ? *reinterpret_cast<const uint2*>(queries + row * kDim + offset) : make_uint2(0, 0);
            };
            const uint2 upper = four(query), lower = four(query + 8);
            parts[tile][step][lane] = make_uint4(upper.x, lower.x, upper.y, lower.y);
        }
    }
};

template <int kDim>
struct QueryFragments<float, kDim> {
    // Each row followed by 16 unused bytes that spread rows over the banks.
    alignas(16) float rows[kQueries][kDim + 4];

    __device__ void load(const float* queries, int count) {
        for (int i = static_cast<int>(threadIdx.x); i < kQueries * kDim; i += static_cast<int>(blockDim.x))
            rows[i / kDim][i % kDim] = i / kDim < count ? queries[i] : 0.0F;
    }
};

// Sixteen keys of 16-bit elements.
template <class T, int kDim>
struct KeyTile {
    static constexpr int kPairs = kDim / 32;       // 16 bytes of a thread serve two steps
    static constexpr bool kRest = kDim % 32 != 0;  // 8 bytes more serve a last one
    uint4 vectors[kKeyTiles][kPairs];
    uint2 rest[kKeyTiles];

    // Rows from `end` on are 0.
    __device__ void load(const T* keys, int row, int end) {
        const int thread = lane_index() % 4;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
            const int own = row + n * 8 + lane_index() / 4;
            const T* key = keys + static_cast<size_t>(own) * kDim;
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair)
                vectors[n][pair] = own < end ? *reinterpret_cast<const uint4*>(key + pair * 32 + thread * 8)
                                             : make_uint4(0, 0, 0, 0);
            if (kRest)
                rest[n] = own < end ? *reinterpret_cast<const uint2*>(key + kPairs * 32 + thread * 4)
                                    : make_uint2(0, 0);
        }
    }

    // Products with the first `count` queries, rounded up to tiles of them.
    __device__ void multiply(const QueryFragments<T, kDim>& queries, int count, TileScores& scores) const {
#pragma unroll
        for (int m = 0; m < kQueryTiles; ++m) {
            if (m * kQueryTileRows >= count) break;
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
                for (float& score : scores[m][n]) score = 0.0F;
#pragma unroll
            for (int step = 0; step < kDim / 16; ++step) {
                const uint4 q = queries.parts[m][step][lane_index()];
#pragma unroll
                for (int n = 0; n < kKeyTiles; ++n) {
                    const bool paired = step / 2 < kPairs;
                    const uint4 four = paired ? vectors[n][step / 2] : make_uint4(rest[n].x, rest[n].y, 0, 0);
                    if (step % 2 == 0)
                        multiply_add<T>(scores[m][n], {q.x, q.y, q.z, q.w}, {four.x, four.y});
                    else
                        multiply_add<T>(scores[m][n], {q.x, q.y, q.z, q.w}, {four.z, four.w});
                }
            }
        }
    }
};

// The same with float32 keys, whose products tensor cores would round: every thread works out its own scores.
template <int kDim>
struct KeyTile<float, kDim> {
    const float* rows[kKeyTiles][2];

    // Rows from `end` on are another row.
    __device__ void load(const float* keys, int row, int end) {
        for (int n = 0; n < kKeyTiles; ++n)
            for (int c = 0; c < 2; ++c) {
                const int own = row + n * 8 + lane_index() % 4 * 2 + c;
                rows[n][c] = keys + static_cast<size_t>(own < end ? own : row) * kDim;
            }
    }

    __device__ void multiply(const QueryFragments<float, kDim>& queries, int count, TileScores& scores) const {
        const int first = lane_index() / 4;
#pragma unroll
        for (int m = 0; m < kQueryTiles; ++m)
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
                for (float& score : scores[m][n]) score = 0.0F;
        for (int d = 0; d < kDim; d += 4) {
            float4 key[kKeyTiles][2];
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) key[n][c] = *reinterpret_cast<const float4*>(rows[n][c] + d);
#pragma unroll
            for (int m = 0; m < kQueryTiles; ++m) {
                if (m * kQueryTileRows >= count) break;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float* row = queries.rows[m * kQueryTileRows + half * 8 + first];
                    const float4 q = *reinterpret_cast<const float4*>(row + d);
#pragma unroll
                    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            float& sum = scores[m][n][2 * half + c];
                            const float4 k = key[n][c];
                            sum = fmaf(k.x, q.x, fmaf(k.y, q.y, fmaf(k.z, q.z, fmaf(k.w, q.w, sum))));
                        }
                }
            }
        }
    }
};

}  // namespace starkv
