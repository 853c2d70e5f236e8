// SPDX-License-Identifier: Apache-2.0
// What the kernels of attention to a cache of codes see: shapes, tensors, workspace.
#pragma once

#include "attention_parts.h"
#include "quantized_row.h"
#include "starkv_kernels.h"

namespace starkv {

// Query heads of a KV head are worked at in tiles: as many as the tensor cores' product has columns.
constexpr int kTileHeads = 8;

struct QuantizedView {
    starkv_quantized_attention_shape shape;
    starkv_quantized_attention_buffers buffers;

    int sharing;      // query heads of a KV head
    int block_tiles;  // of heads that one block of decoding serves, 1 or 2
    int tiles;        // of heads of a KV head, a multiple of block_tiles
    int terms;        // 16-bit numbers that a query's element is the sum of
    int steps;        // of a product of queries with keys, each of 16 elements
    int row_bytes;
    AttentionParts parts;
    // Workspace. The queries, with the keys' scales folded in, as the tensor cores take them, and what their
    // products are multiplied by to become scores.
    uint2* queries;  // [B, G, tiles, terms, steps, 32]
    float* factors;  // [B, G, tiles, 8]
    // A score's part from the keys' bias is a sum over pairs of columns of coefficients times the cosine and
    // the sine of a position, and so a sum of three numbers that depend on one component each.
    float2* coefficients;  // [B, G, tiles, D / 2, 8]
    float* tables;         // [B, G, tiles, 3, P, 8], up to the greatest component of the new row's position

    __device__ int sequence_of(int group) const { return group / shape.kv_heads; }
    __device__ const int32_t* position(int sequence, int row) const {
        return buffers.positions + (static_cast<size_t>(sequence) * shape.capacity + row) * kRopeComponents;
    }
    // `group` counts the KV heads of all sequences, `tile` the tiles of a KV head.
    __device__ size_t tile_index(int group, int tile) const {
        return static_cast<size_t>(group) * tiles + tile;
    }
    __device__ uint2* queries_of(int group, int tile) const {
        return queries + tile_index(group, tile) * terms * steps * kWarp;
    }
    __device__ float* factors_of(int group, int tile) const {
        return factors + tile_index(group, tile) * kTileHeads;
    }
    __device__ float2* coefficients_of(int group, int tile) const {
        return coefficients + tile_index(group, tile) * (shape.head_dim / 2) * kTileHeads;
    }
    __device__ float* table_of(int group, int tile, int component) const {
        const size_t table = tile_index(group, tile) * kRopeComponents + component;
        return tables + table * shape.table_rows * kTileHeads;
    }
    // The pairs of columns that rotate by a component.
    __device__ int first_pair(int component) const {
        int first = 0;
        for (int before = 0; before < component; ++before) first += shape.mrope_section[before];
        return first;
    }
};

// One sequence, its length and its new row's position checked: kernels index by it alone.
struct QuantizedSequence {
    int index;
    int held;      // rows before the new one
    bool valid;    // otherwise it is left alone and its output is 0
    int position;  // greatest component of the new row's position

    __device__ QuantizedSequence(const QuantizedView& view, int index_) : index(index_), position(-1) {
        held = view.buffers.kv_len[index];
        valid = held >= 0 && held < view.shape.capacity;
        if (!valid) return;
        const int32_t* newest = view.position(index, held);
        valid = in_tables(newest, view.shape.table_rows);
        for (int component = 0; component < kRopeComponents; ++component)
            position = max(position, newest[component]);
    }
};

// Launches the blocks that decode; whether CUDA took it. Its instances are compiled one by one.
template <int kBits>
bool decode_codes(const QuantizedView& view, Stream stream);

}  // namespace starkv
