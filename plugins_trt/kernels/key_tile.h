// SPDX-License-Identifier: Apache-2.0
// Products of queries with sixteen keys, by one warp. Keys go from device memory straight into registers.
//
// With g = lane / 4 and t = lane % 4 a thread gets products of queries 16 m + 8 h + g with keys 8 n + 2 t +
// c, at products[m][n][2 h + c].
#pragma once

#include "query_fragments.h"

namespace starkv {

constexpr int kTileRows = 16;
constexpr int kKeyTiles = kTileRows / 8;

template <int kTiles>
using TileProducts = float[kTiles][kKeyTiles][4];

// Keys of 16-bit elements.
template <class T, int kDim>
struct KeyTile {
    static constexpr int kPairs = kDim / 32;       // 16 bytes of a thread serve two steps
    static constexpr bool kRest = kDim % 32 != 0;  // 8 bytes more serve a last one
    uint4 vectors[kKeyTiles][kPairs];
    uint2 rest[kKeyTiles];

    // key_of(row) says where a key lies, for first ... first + 15.
    template <class KeyOf>
    __device__ void load(KeyOf key_of, int first) {
        const int thread = lane_index() % 4;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
            const T* key = key_of(first + n * 8 + lane_index() / 4);
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair)
                vectors[n][pair] = *reinterpret_cast<const uint4*>(key + pair * 32 + thread * 8);
            if (kRest) rest[n] = *reinterpret_cast<const uint2*>(key + kPairs * 32 + thread * 4);
        }
    }

    // With the first `count` queries, rounded up to tiles of them.
    template <int kTiles>
    __device__ void multiply(const QueryFragments<T, kDim, kTiles>& queries, int count,
                             TileProducts<kTiles>& products) const {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
            if (m * kQueryTileRows >= count) break;
#pragma unroll
            for (auto& tile : products[m])
#pragma unroll
                for (float& product : tile) product = 0.0F;
#pragma unroll
            for (int step = 0; step < kDim / 16; ++step) {
                const uint4 query = queries.parts[m][step][lane_index()];
#pragma unroll
                for (int n = 0; n < kKeyTiles; ++n) {
                    const uint2 key = operand(n, step);
                    multiply_add<T>(products[m][n], {query.x, query.y, query.z, query.w}, {key.x, key.y});
                }
            }
        }
    }

private:
    __device__ uint2 operand(int n, int step) const {
        if (step >= 2 * kPairs) return rest[n];
        const uint4& pair = vectors[n][step / 2];
        return step % 2 ? make_uint2(pair.z, pair.w) : make_uint2(pair.x, pair.y);
    }
};

// Keys of float32, whose products tensor cores would round: every thread works out its own.
template <int kDim>
struct KeyTile<float, kDim> {
    const float* keys[kKeyTiles][2];

    template <class KeyOf>
    __device__ void load(KeyOf key_of, int first) {
        for (int n = 0; n < kKeyTiles; ++n)
            for (int c = 0; c < 2; ++c) keys[n][c] = key_of(first + n * 8 + lane_index() % 4 * 2 + c);
    }

    template <int kTiles>
    __device__ void multiply(const QueryFragments<float, kDim, kTiles>& queries, int count,
                             TileProducts<kTiles>& products) const {
        const int group = lane_index() / 4;
#pragma unroll
        for (auto& tiles : products)
#pragma unroll
            for (auto& tile : tiles)
#pragma unroll
                for (float& product : tile) product = 0.0F;
        for (int d = 0; d < kDim; d += 4) {
            float4 key[kKeyTiles][2];
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) key[n][c] = *reinterpret_cast<const float4*>(keys[n][c] + d);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
                if (m * kQueryTileRows >= count) break;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float* row = queries.rows[m * kQueryTileRows + half * 8 + group];
                    const float4 q = *reinterpret_cast<const float4*>(row + d);
#pragma unroll
                    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            float& sum = products[m][n][2 * half + c];
                            const float4 k = key[n][c];
                            sum = fmaf(k.x, q.x, fmaf(k.y, q.y, fmaf(k.z, q.z, fmaf(k.w, q.w, sum))));
                        }
                }
            }
        }
    }
};

}  // namespace starkv
