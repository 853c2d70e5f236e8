// SPDX-License-Identifier: Apache-2.0
// Which rows a block and which columns a thread has when rows become codes and codes rows, and how they are
// read and written: numbers by 16 bytes, codes of 8 bits by 16 and codes of 4 bits by 8.
#pragma once

#include "quantized_codes.h"
#include "quantized_row.h"
#include "starkv_kernels.h"

namespace starkv {

constexpr int kCodeRowsThreads = 128;
// Rows of a block; no more than a warp has lanes.
constexpr int kCodeRowsTile = 16;
// Neighbouring columns of a row that a thread has; every head dimension is a multiple of them.
constexpr int kColumns = 16;
constexpr int kMostRowPairs = 128;

struct CodeRowsView {
    starkv_code_rows_shape shape;
    starkv_code_rows_buffers buffers;
    int row_bytes;  // of codes

    __device__ const int32_t* position(int layer, int row) const {
        const size_t slot = static_cast<size_t>(layer) * shape.slots + shape.slot;
        return buffers.positions + (slot * shape.slot_capacity + row) * kRopeComponents;
    }
    // Where rows lie, counted over all layers and KV heads: in the float cache, in the cache of codes.
    __device__ size_t float_row(int layer, int head, int row) const {
        return (static_cast<size_t>(layer) * shape.kv_heads + head) * shape.capacity + row;
    }
    __device__ size_t code_row(int layer, int head, int row) const {
        const size_t slot = static_cast<size_t>(layer) * shape.slots + shape.slot;
        return (slot * shape.kv_heads + head) * shape.slot_capacity + row;
    }
};

// The rows that a block has, its layer's length checked: kernels index by them alone.
struct RowTile {
    int layer, first;
    bool sound;  // whether the layer's length makes sense
    int rows;    // 0 or less if there are none

    __device__ explicit RowTile(const CodeRowsView& view)
        : layer(static_cast<int>(blockIdx.y)), first(static_cast<int>(blockIdx.x) * kCodeRowsTile) {
        const int length = view.buffers.lengths[layer];
        sound = length >= 0 && length <= view.shape.capacity && length <= view.shape.slot_capacity;
        rows = sound ? min(kCodeRowsTile, length - first) : 0;
    }
};

struct RowTileShared {
    float cosines[kCodeRowsTile][kMostRowPairs];
    float sines[kCodeRowsTile][kMostRowPairs];
    int placed[kCodeRowsTile];  // whether the tables have the row's position
    int wrong[kCodeRowsTile];   // more than 0 if anything of the row is wrong
};

// The angles of the tile's rows for all threads of the block; NaN for positions that the tables don't have.
__device__ inline void look_up_angles(const CodeRowsView& view, const RowTile& tile, RowTileShared& shared) {
    const int pairs = view.shape.head_dim / 2;
    for (int i = static_cast<int>(threadIdx.x); i < tile.rows * pairs; i += kCodeRowsThreads) {
        const int row = i / pairs, pair = i % pairs;
        const int32_t* position = view.position(tile.layer, tile.first + row);
        const bool placed = in_tables(position, view.shape.table_rows);
        float cosine = bit_cast<float>(0x7fc00000U), sine = cosine;
        if (placed) {
            const int angle = position[component_of(view.shape.mrope_section, pair)];
            const size_t entry = static_cast<size_t>(angle) * pairs + pair;
            cosine = view.buffers.cos_table[entry];
            sine = view.buffers.sin_table[entry];
        }
        shared.cosines[row][pair] = cosine;
        shared.sines[row][pair] = sine;
        if (pair == 0) {
            shared.placed[row] = placed;
            shared.wrong[row] = !placed;
        }
    }
    __syncthreads();
}

__device__ inline void load_four(const float* from, float* to) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
}

template <class T>
__device__ void load_columns(const T* from, float (&to)[kColumns]) {
    constexpr int kOfWord = 4 / sizeof(T);
#pragma unroll
    for (int start = 0; start < kColumns; start += 4 * kOfWord) {
        const uint4 vector = *reinterpret_cast<const uint4*>(from + start);
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kOfWord == 1) {
                to[start + i] = bit_cast<float>(words[i]);
            } else {
                to[start + 2 * i] = unpack_first<T>(words[i]);
                to[start + 2 * i + 1] = unpack_second<T>(words[i]);
            }
        }
    }
}

template <class T>
__device__ void store_columns(const float (&from)[kColumns], T* to) {
    constexpr int kOfWord = 4 / sizeof(T);
#pragma unroll
    for (int start = 0; start < kColumns; start += 4 * kOfWord) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kOfWord == 1)
                words[i] = bit_cast<uint32_t>(from[start + i]);
            else
                words[i] = pack<T>(from[start + 2 * i], from[start + 2 * i + 1]);
        }
        *reinterpret_cast<uint4*>(to + start) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Codes of a thread's columns of a row.
template <int kBits>
struct CodeColumns {
    static constexpr int kBytes = kColumns * kBits / 8;
    static constexpr int kOfWord = 32 / kBits;
    LaneShare<kBytes, 1> share;

    __device__ void load(const unsigned char* from) { share.load(from, 0); }
    __device__ void store(unsigned char* to) const {
        if constexpr (kBytes == 16)
            *reinterpret_cast<uint4*>(to) =
                make_uint4(share.words[0], share.words[1], share.words[2], share.words[3]);
        else
            *reinterpret_cast<uint2*>(to) = make_uint2(share.words[0], share.words[1]);
    }
    // Column by column, in words that were 0.
    __device__ void set(int i, int code) {
        share.words[i / kOfWord] |= stored_code(code, kBits) << i % kOfWord * kBits;
    }
    __device__ int get(int i) const {
        return code_from(share.words[i / kOfWord] >> i % kOfWord * kBits, kBits);
    }
};

// A thread's columns: of keys or of values, in one KV head.
struct RowColumns {
    bool is_key;
    int head, first, half;
    float scale[kColumns], bias[kColumns];
    float partner_bias[kColumns];  // of a key: the biases that rotation mixes with its own

    // `share` counts the sixteens of columns of all keys' heads, then of all values'.
    __device__ RowColumns(const CodeRowsView& view, int layer, int share) : half(view.shape.head_dim / 2) {
        const int dim = view.shape.head_dim, of_head = dim / kColumns;
        is_key = share < of_head * view.shape.kv_heads;
        head = share / of_head % view.shape.kv_heads;
        first = share % of_head * kColumns;
        const auto& buffers = view.buffers;
        const size_t of_layer = (static_cast<size_t>(layer) * view.shape.kv_heads + head) * dim;
        const float* const scales = (is_key ? buffers.k_scale : buffers.v_scale) + of_layer;
        const float* const biases = (is_key ? buffers.k_bias : buffers.v_bias) + of_layer;
#pragma unroll
        for (int i = 0; i < kColumns; i += 4) {
            const int column = first + i;
            load_four(scales + column, scale + i);
            load_four(biases + column, bias + i);
            load_four(biases + (column < half ? column + half : column - half), partner_bias + i);
        }
    }

    template <class T>
    __device__ T* floats(const CodeRowsView& view, const RowTile& tile, int row) const {
        const size_t at = view.float_row(tile.layer, head, tile.first + row);
        return static_cast<T*>(is_key ? view.buffers.k : view.buffers.v) + at * (2 * half) + first;
    }
    __device__ unsigned char* codes(const CodeRowsView& view, const RowTile& tile, int row) const {
        auto* const rows = static_cast<unsigned char*>(is_key ? view.buffers.k_codes : view.buffers.v_codes);
        const size_t at = view.code_row(tile.layer, head, tile.first + row);
        return rows + at * view.row_bytes + first * view.shape.bits / 8;
    }
    // What a row's numbers have beyond what its codes stand for.
    __device__ void biases(const RowTileShared& shared, int row, float (&to)[kColumns]) const {
#pragma unroll
        for (int start = 0; start < kColumns; start += 4) {
            // Four columns never lie on both sides of the middle.
            const bool leads = first + start < half;
            const int pair = leads ? first + start : first + start - half;
            float cosines[4], sines[4];
            if (is_key) {
                load_four(&shared.cosines[row][pair], cosines);
                load_four(&shared.sines[row][pair], sines);
            }
#pragma unroll
            for (int i = start; i < start + 4; ++i)
                to[i] = is_key ? rotated_column(bias[i], partner_bias[i], cosines[i - start],
                                                sines[i - start], leads)
                               : bias[i];
        }
    }
};

}  // namespace starkv
