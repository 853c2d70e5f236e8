// SPDX-License-Identifier: Apache-2.0
// Sixteen rows of a cache against the query heads that share it, by one warp.
//
// Keys and values go from device memory straight into the registers that the tensor cores multiply: nothing is
// staged in shared memory, every byte is read once, in pieces of 16 bytes where the head dimension allows. Both
// products are permuted for that: a sum over the head dimension does not care for its order (key_tile.h), and
// columns of the output may be worked out in any order that is known when they are stored.
//
// Throughout, g = lane / 4 and t = lane % 4.
#pragma once

#include "attention_view.h"
#include "mma.h"

namespace starkv {

constexpr int kDecodeTile = 16;

// A KV head's rows: those of the cache, and the newest one, which need not have been stored yet.
template <class T, int kDim>
struct CacheRows {
    const T* cache;
    const T* newest;
    int held;

    __device__ const T* operator[](int row) const {
        return row < held ? cache + static_cast<size_t>(row) * kDim : newest;
    }
    __device__ int end() const { return held + 1; }
};

// Query heads in shared memory. Unused bytes behind each spread rows over the banks; heads behind the last are 0.
template <class T, int kDim>
struct HeadRows {
    static constexpr int kStride = (kDim * 2 + 63) / 128 * 64 + 32;
    alignas(16) T rows[kDecodeHeads][kStride];

    __device__ void load(const T* source, int count) {
        constexpr int kVectors = kDim / 8;
        for (int i = static_cast<int>(threadIdx.x); i < kDecodeHeads * kVectors; i += kAttentionThreads) {
            const int head = i / kVectors, vector = i % kVectors;
            auto* to = reinterpret_cast<uint4*>(rows[head]) + vector;
            *to = head < count ? reinterpret_cast<const uint4*>(source)[i] : make_uint4(0, 0, 0, 0);
        }
    }
};

// A thread holds parts of keys g and g + 8: 16 bytes for two steps of the product, and the last 8 for one.
template <class T, int kDim>
struct DecodeKeys {
    static constexpr int kPairs = kDim / 32;
    static constexpr bool kRest = kDim % 32 != 0;
    uint4 vectors[2][kPairs];
    uint2 rest[2];

    // Rows from the end on are 0.
    __device__ void load(const CacheRows<T, kDim>& keys, int first) {
        const int thread = lane_index() % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + half * 8 + lane_index() / 4;
            const bool real = row < keys.end();
            const T* key = keys[row];
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair)
                vectors[half][pair] = real ? *reinterpret_cast<const uint4*>(key + pair * 32 + thread * 8)
                                           : make_uint4(0, 0, 0, 0);
            if (kRest)
                rest[half] = real ? *reinterpret_cast<const uint2*>(key + kPairs * 32 + thread * 4) : make_uint2(0, 0);
        }
    }

    // products[half]: heads g, g, g + 8, g + 8 with keys 8 half + 2t, 2t + 1, 2t, 2t + 1.
    __device__ void multiply(const HeadRows<T, kDim>& heads, float (&products)[2][4]) const {
        const T* upper = heads.rows[lane_index() / 4];
        const T* lower = heads.rows[lane_index() / 4 + 8];
        const int thread = lane_index() % 4;
#pragma unroll
        for (auto& half : products)
            for (float& product : half) product = 0.0F;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            const uint4 u = *reinterpret_cast<const uint4*>(upper + pair * 32 + thread * 8);
            const uint4 l = *reinterpret_cast<const uint4*>(lower + pair * 32 + thread * 8);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 key = vectors[half][pair];
                multiply_add<T>(products[half], {u.x, l.x, u.y, l.y}, {key.x, key.y});
                multiply_add<T>(products[half], {u.z, l.z, u.w, l.w}, {key.z, key.w});
            }
        }
        if (kRest) {
            const uint2 u = *reinterpret_cast<const uint2*>(upper + kPairs * 32 + thread * 4);
            const uint2 l = *reinterpret_cast<const uint2*>(lower + kPairs * 32 + thread * 4);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                multiply_add<T>(products[half], {u.x, l.x, u.y, l.y}, {rest[half].x, rest[half].y});
        }
    }
};

// A thread holds parts of rows 2t, 2t + 1, 2t + 8 and 2t + 9: of every 64 columns the 8 from 8g on, so that a
// warp reads whole lines; of the last 16 or 32 columns its eighth.
template <class T, int kDim>
struct DecodeValues {
    static constexpr int kPieces = kDim / 64;
    static constexpr int kRestColumns = kDim % 64 / 8;
    static constexpr int kWords = kDim / 16;
    uint32_t words[4][kWords];

    // Rows from the end on are 0: what lies there may be no numbers, which no weight of 0 would silence.
    __device__ void load(const CacheRows<T, kDim>& values, int first) {
        const int group = lane_index() / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = first + lane_index() % 4 * 2 + i % 2 + i / 2 * 8;
            const bool real = row < values.end();
            const T* value = values[row];
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                const auto* from = reinterpret_cast<const uint4*>(value + piece * 64 + group * 8);
                const uint4 vector = real ? *from : make_uint4(0, 0, 0, 0);
                words[i][piece * 4] = vector.x;
                words[i][piece * 4 + 1] = vector.y;
                words[i][piece * 4 + 2] = vector.z;
                words[i][piece * 4 + 3] = vector.w;
            }
            const T* last = value + kPieces * 64 + group * kRestColumns;
            if (kRestColumns == 2) words[i][kWords - 1] = real ? *reinterpret_cast<const uint32_t*>(last) : 0;
            if (kRestColumns == 4) {
                const uint2 vector = real ? *reinterpret_cast<const uint2*>(last) : make_uint2(0, 0);
                words[i][kWords - 2] = vector.x;
                words[i][kWords - 1] = vector.y;
            }
        }
    }

    // sums[n] += weights * values of heads g, g, g + 8, g + 8. A word holds two neighbouring columns of one row; the
    // product wants one column of two rows. Its columns 2t, 2t + 1 are column n of two threads' pieces: see store().
    __device__ void multiply(const uint32_t (&weights)[4], float (&sums)[kDim / 8][4]) const {
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
            const uint32_t a = words[0][word], b = words[1][word], c = words[2][word], d = words[3][word];
            multiply_add<T>(sums[2 * word], weights, {(a & 0xffffU) | b << 16, (c & 0xffffU) | d << 16});
            multiply_add<T>(sums[2 * word + 1], weights, {a >> 16 | (b & 0xffff0000U), c >> 16 | (d & 0xffff0000U)});
        }
    }

    // Puts a thread's sums of one head, g (0) or g + 8 (1), where they belong in the head's row, times `factor`.
    static __device__ void store(const float (&sums)[kDim / 8][4], int head, float factor, float* row) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int part = lane_index() % 4 * 2 + i, from = 2 * head + i;
#pragma unroll
            for (int n = 0; n < kPieces * 8; n += 4)
                *reinterpret_cast<float4*>(row + n / 8 * 64 + part * 8 + n % 8) = {
                    sums[n][from] * factor, sums[n + 1][from] * factor, sums[n + 2][from] * factor,
                    sums[n + 3][from] * factor};
#pragma unroll
            for (int n = 0; n < kRestColumns; ++n)
                row[kPieces * 64 + part * kRestColumns + n] = sums[kPieces * 8 + n][from] * factor;
        }
    }
};

}  // namespace starkv
