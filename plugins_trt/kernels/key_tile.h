// SPDX-License-Identifier: Apache-2.0
// Products of a tile of keys with a block of queries, by one warp.
//
// Keys go from device memory straight into registers. A product over D does not care in which order it is
// summed, so both operands are permuted alike: a thread reads 16 consecutive bytes of a row and uses them for
// two steps of the tensor cores, instead of the scattered elements that their layout names.
#pragma once

#include "compress_view.h"
#include "mma.h"

namespace starkv {

constexpr int kTileRows = 16;
constexpr int kTileQueries = 8;
constexpr int kQueryTiles = kQueries / kTileQueries;

// A block's queries in shared memory, each followed by unused bytes that spread rows over the banks; those
// behind the last are 0.
template <class T, int kDim>
struct QueryRows {
    static constexpr int kStride = ((kDim * static_cast<int>(sizeof(T)) + 63) / 128 * 128 + 64) / sizeof(T);
    alignas(16) T rows[kQueries][kStride];

    __device__ void load(const T* source, int count) {
        constexpr int kVectors = kDim * sizeof(T) / 16;
        for (int i = static_cast<int>(threadIdx.x); i < kQueries * kVectors; i += static_cast<int>(blockDim.x)) {
            const int query = i / kVectors, vector = i % kVectors;
            auto* to = reinterpret_cast<uint4*>(rows[query]) + vector;
            const auto* from = reinterpret_cast<const uint4*>(source) + query * kVectors + vector;
            *to = query < count ? *from : make_uint4(0, 0, 0, 0);
        }
    }
};

// Sixteen keys of 16-bit elements. A thread with g = lane / 4, t = lane % 4 holds parts of rows g and g + 8, and
// gets scores of these with queries 8 n + 2 t and 8 n + 2 t + 1.
template <class T, int kDim>
struct KeyTile {
    static constexpr int kPairs = kDim / 32;            // 16 bytes of a thread serve two steps
    static constexpr bool kRest = kDim % 32 != 0;       // 8 bytes more serve a last one
    uint4 vectors[2][kPairs];
    uint2 rest[2];

    // Rows from `end` on are 0.
    __device__ void load(const T* keys, int row, int end) {
        const int thread = lane_index() % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = row + half * 8 + lane_index() / 4;
            const T* key = keys + static_cast<size_t>(own) * kDim;
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair)
                vectors[half][pair] = own < end ? *reinterpret_cast<const uint4*>(key + pair * 32 + thread * 8)
                                                : make_uint4(0, 0, 0, 0);
            if (kRest)
                rest[half] = own < end ? *reinterpret_cast<const uint2*>(key + kPairs * 32 + thread * 4)
                                       : make_uint2(0, 0);
        }
    }

    // Scaled scores with the first `count` queries, rounded up to tiles.
    __device__ void scores(const QueryRows<T, kDim>& queries, int count, float (&result)[kQueryTiles][4]) const {
        const int thread = lane_index() % 4;
        const float scale = 1.0F / sqrtf(static_cast<float>(kDim));
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n) {
            if (n * kTileQueries >= count) break;
            const T* query = queries.rows[n * kTileQueries + lane_index() / 4];
            float sums[4] = {0.0F, 0.0F, 0.0F, 0.0F};
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                const uint4 q = *reinterpret_cast<const uint4*>(query + pair * 32 + thread * 8);
                const uint4 upper = vectors[0][pair], lower = vectors[1][pair];
                multiply_add<T>(sums, {upper.x, lower.x, upper.y, lower.y}, {q.x, q.y});
                multiply_add<T>(sums, {upper.z, lower.z, upper.w, lower.w}, {q.z, q.w});
            }
            if (kRest) {
                const uint2 q = *reinterpret_cast<const uint2*>(query + kPairs * 32 + thread * 4);
                multiply_add<T>(sums, {rest[0].x, rest[1].x, rest[0].y, rest[1].y}, {q.x, q.y});
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) result[n][i] = sums[i] * scale;
        }
    }
};

// The same with float32 keys, whose products tensor cores would round: every thread works out its own scores.
template <int kDim>
struct KeyTile<float, kDim> {
    const float* rows[2];

    // Rows from `end` on are another row.
    __device__ void load(const float* keys, int row, int end) {
        for (int half = 0; half < 2; ++half) {
            const int own = row + half * 8 + lane_index() / 4;
            rows[half] = keys + static_cast<size_t>(own < end ? own : row) * kDim;
        }
    }

    __device__ void scores(const QueryRows<float, kDim>& queries, int count, float (&result)[kQueryTiles][4]) const {
        const float scale = 1.0F / sqrtf(static_cast<float>(kDim));
        const int first = lane_index() % 4 * 2;
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) result[n][i] = 0.0F;
        for (int d = 0; d < kDim; d += 4) {
            const float4 upper = *reinterpret_cast<const float4*>(rows[0] + d);
            const float4 lower = *reinterpret_cast<const float4*>(rows[1] + d);
#pragma unroll
            for (int n = 0; n < kQueryTiles; ++n) {
                if (n * kTileQueries >= count) break;
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float4 q = *reinterpret_cast<const float4*>(queries.rows[n * kTileQueries + first + c] + d);
                    float& up = result[n][c];
                    float& low = result[n][2 + c];
                    up = fmaf(upper.x, q.x, fmaf(upper.y, q.y, fmaf(upper.z, q.z, fmaf(upper.w, q.w, up))));
                    low = fmaf(lower.x, q.x, fmaf(lower.y, q.y, fmaf(lower.z, q.z, fmaf(lower.w, q.w, low))));
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) result[n][i] = result[n][i] * scale;
    }
};

}  // namespace starkv
