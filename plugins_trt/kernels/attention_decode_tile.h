// SPDX-License-Identifier: Apache-2.0
// Sixteen rows of a cache against the query heads that share it, by one warp.
//
// Keys and values go from device memory straight into the registers that the tensor cores multiply: nothing
// is staged in shared memory, every byte is read once, in pieces of 16 bytes where the head dimension allows.
// Both products are permuted for that: the one with keys as in key_tile.h, and columns of the output may be
// worked out in any order that is known when they are stored.
//
// Throughout, g = lane / 4 and t = lane % 4.
#pragma once

#include "attention_view.h"
#include "bytes.h"
#include "key_tile.h"

namespace starkv {

// A KV head's rows: those of the caches, and the newest one, which need not have been stored yet. It also
// stands for rows behind it, which get no weight: what lies there in the caches may be no numbers.
template <class T, int kDim>
struct DecodeRows {
    const AttentionView& view;
    size_t cache, newest;  // elements before the head's rows in the caches, and before its row in k and v
    int held;

    // `group` counts the KV heads of all sequences.
    __device__ DecodeRows(const AttentionView& view_, int group, int held_)
        : view(view_),
          cache(static_cast<size_t>(group) * view.shape.capacity * kDim),
          newest(static_cast<size_t>(group) * kDim),
          held(held_) {}

    __device__ int end() const { return held + 1; }
    __device__ const T* key(int row) const { return find(view.buffers.present_k, view.buffers.k, row); }
    __device__ const T* value(int row) const { return find(view.buffers.present_v, view.buffers.v, row); }

    // Puts the newest row behind the held ones.
    __device__ void store_newest() const {
        constexpr int kVectors = kDim / 8;
        const int vector = static_cast<int>(threadIdx.x) % kVectors;
        const size_t to = cache + static_cast<size_t>(held) * kDim;
        if (threadIdx.x < kVectors)
            copy_vector(view.buffers.present_k, to, view.buffers.k, vector);
        else if (threadIdx.x < 2 * kVectors)
            copy_vector(view.buffers.present_v, to, view.buffers.v, vector);
    }

private:
    __device__ const T* find(const void* caches, const void* new_rows, int row) const {
        const T* in_cache = static_cast<const T*>(caches) + cache + static_cast<size_t>(row) * kDim;
        return row < held ? in_cache : static_cast<const T*>(new_rows) + newest;
    }
    __device__ void copy_vector(void* caches, size_t to, const void* new_rows, int vector) const {
        const T* from = static_cast<const T*>(new_rows) + newest;
        reinterpret_cast<uint4*>(static_cast<T*>(caches) + to)[vector] =
            reinterpret_cast<const uint4*>(from)[vector];
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

    __device__ void load(const DecodeRows<T, kDim>& rows, int first) {
        const int group = lane_index() / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const T* value = rows.value(first + lane_index() % 4 * 2 + i % 2 + i / 2 * 8);
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                const uint4 vector = *reinterpret_cast<const uint4*>(value + piece * 64 + group * 8);
                words[i][piece * 4] = vector.x;
                words[i][piece * 4 + 1] = vector.y;
                words[i][piece * 4 + 2] = vector.z;
                words[i][piece * 4 + 3] = vector.w;
            }
            const T* last = value + kPieces * 64 + group * kRestColumns;
            if (kRestColumns == 2) words[i][kWords - 1] = *reinterpret_cast<const uint32_t*>(last);
            if (kRestColumns == 4) {
                const uint2 vector = *reinterpret_cast<const uint2*>(last);
                words[i][kWords - 2] = vector.x;
                words[i][kWords - 1] = vector.y;
            }
        }
    }

    // sums[n] += weights * values of heads g, g, g + 8, g + 8. A word holds two neighbouring columns of one
    // row; the product wants one column of two rows. Its columns 2t, 2t + 1 are column n of two threads'
    // pieces: see store().
    __device__ void multiply(const uint32_t (&weights)[4], float (&sums)[kDim / 8][4]) const {
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
            const uint32_t a = words[0][word], b = words[1][word], c = words[2][word], d = words[3][word];
            multiply_add<T>(sums[2 * word], weights, {lower_halves(a, b), lower_halves(c, d)});
            multiply_add<T>(sums[2 * word + 1], weights, {upper_halves(a, b), upper_halves(c, d)});
        }
    }

    // Puts a thread's sums of one head, g (0) or g + 8 (1), times `factor` where they belong in its row.
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
