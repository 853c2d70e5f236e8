// SPDX-License-Identifier: Apache-2.0
// Before decoding with a cache of codes: the new row is stored, scales are folded into the queries, and what
// the keys' bias adds to scores is tabulated by position.
#pragma once

#include "block.h"
#include "quantized_codes.h"
#include "quantized_view.h"

namespace starkv {

constexpr int kPrepareThreads = 128;
// Positions that a block tabulates at once, each for a tile of heads.
constexpr int kTablePositions = kPrepareThreads / kTileHeads;
// More blocks of one KV head would have little to do.
constexpr int kMostTableBlocks = 64;
constexpr int kMostPairs = 128;
// A query's greatest element becomes this, so that small ones keep their digits in 16 bits and sums of
// products stay far from infinity.
constexpr float kGreatestQuery = 4096.0F;

struct PrepareShared {
    float2 coefficients[kMostPairs][kTileHeads];
};

// A KV head's new row and queries.
template <class T>
struct NewRow {
    const QuantizedView& view;
    QuantizedSequence sequence;
    int group, dim, kv_head;

    __device__ NewRow(const QuantizedView& view_, int group_)
        : view(view_),
          sequence(view_, view_.sequence_of(group_)),
          group(group_),
          dim(view_.shape.head_dim),
          kv_head(group_ % view_.shape.kv_heads) {}

    // Element of k or v, and of a scale or bias.
    __device__ float element(const void* rows, int column) const {
        return to_float(static_cast<const T*>(rows)[static_cast<size_t>(group) * dim + column]);
    }
    __device__ float parameter(const float* of_heads, int column) const {
        return of_heads[kv_head * dim + column];
    }
    // Of a query that shares this KV head; those behind the last are 0.
    __device__ float query(int head, int column) const {
        if (head >= view.sharing) return 0.0F;
        const size_t row = static_cast<size_t>(group) * view.sharing + head;
        return to_float(static_cast<const T*>(view.buffers.q)[row * dim + column]);
    }

    // The keys' bias, rotated to the new row's position.
    __device__ float rotated_bias(int column) const {
        const int half = dim / 2, pair = column % half;
        const int component = component_of(view.shape.mrope_section, pair);
        const int position = view.position(sequence.index, sequence.held)[component];
        const size_t entry = static_cast<size_t>(position) * half + pair;
        const float own = parameter(view.buffers.k_bias, column);
        const float partner = parameter(view.buffers.k_bias, column < half ? column + half : column - half);
        return rotated_column(own, partner, view.buffers.cos_table[entry], view.buffers.sin_table[entry],
                              column < half);
    }
    __device__ uint32_t stored(bool is_key, int column) const {
        const auto& buffers = view.buffers;
        const float bias = is_key ? rotated_bias(column) : parameter(buffers.v_bias, column);
        const float scale = parameter(is_key ? buffers.k_scale : buffers.v_scale, column);
        const float number = element(is_key ? buffers.k : buffers.v, column) - bias;
        return stored_code(code_of(number, scale, view.shape.bits), view.shape.bits);
    }

    // Stores the codes of key and value behind the held rows.
    __device__ void append() const {
        const size_t row = static_cast<size_t>(group) * view.shape.capacity + sequence.held;
        for (int i = static_cast<int>(threadIdx.x); i < 2 * view.row_bytes; i += kPrepareThreads) {
            const bool is_key = i < view.row_bytes;
            const int byte = is_key ? i : i - view.row_bytes;
            const uint32_t bits = view.shape.bits == 8
                                      ? stored(is_key, byte)
                                      : stored(is_key, 2 * byte) | stored(is_key, 2 * byte + 1) << 4;
            auto* rows =
                static_cast<unsigned char*>(is_key ? view.buffers.present_k : view.buffers.present_v);
            rows[row * view.row_bytes + byte] = static_cast<unsigned char>(bits);
        }
    }

    // Of a pair of columns: what its cosine and its sine are multiplied by in a score.
    __device__ float2 coefficient(int head, int pair) const {
        const int other = pair + dim / 2;
        const float q = query(head, pair), q_other = query(head, other), scale = score_scale(dim);
        const float b = parameter(view.buffers.k_bias, pair);
        const float b_other = parameter(view.buffers.k_bias, other);
        return make_float2(fmaf(q, b, q_other * b_other) * scale, fmaf(q_other, b, -(q * b_other)) * scale);
    }

    // One query, by one warp: scaled by the keys' scales, in the order of the tensor cores' operand.
    __device__ void fold(int tile, int head_of_tile) const {
        const int head = tile * kTileHeads + head_of_tile, lane = lane_index();
        const auto scaled = [&](int column) {
            return query(head, column) * parameter(view.buffers.k_scale, column);
        };
        float greatest = 0.0F;
        for (int column = lane; column < dim; column += kWarp)
            greatest = fmaxf(greatest, fabsf(scaled(column)));
        greatest = warp_reduce(greatest, [](float a, float b) { return fmaxf(a, b); });
        // A query as small as that has scores of 0; its inverse might be infinite.
        constexpr float kLeast = 1e-30F;
        const float inverse = greatest > kLeast ? kGreatestQuery / greatest : 0.0F;
        if (lane == 0)
            view.factors_of(group, tile)[head_of_tile] = greatest / kGreatestQuery * score_scale(dim);
        for (int i = lane; i < view.steps * 4; i += kWarp) {
            const int step = i / 4, t = i % 4;
            float rest[4];
            for (int element = 0; element < 4; ++element) {
                const int column = view.shape.bits == 8 ? key_element<8>(view.row_bytes, step, t, element)
                                                        : key_element<4>(view.row_bytes, step, t, element);
                rest[element] = column < 0 ? 0.0F : scaled(column) * inverse;
            }
            for (int term = 0; term < view.terms; ++term) {
                const uint2 four = make_uint2(pack<Half>(rest[0], rest[1]), pack<Half>(rest[2], rest[3]));
                view.queries_of(group, tile)[(term * view.steps + step) * kWarp + head_of_tile * 4 + t] =
                    four;
                rest[0] -= unpack_first<Half>(four.x);
                rest[1] -= unpack_second<Half>(four.x);
                rest[2] -= unpack_first<Half>(four.y);
                rest[3] -= unpack_second<Half>(four.y);
            }
        }
    }
};

// Parts of scores from the keys' bias, for a tile of heads and the positions that this block is to tabulate.
__device__ inline void tabulate(const QuantizedView& view, const PrepareShared& shared, int group, int tile,
                                int end) {
    const int head = static_cast<int>(threadIdx.x) % kTileHeads, half = view.shape.head_dim / 2;
    const int stride = (static_cast<int>(gridDim.x) - 1) * kTablePositions;
    int position =
        (static_cast<int>(blockIdx.x) - 1) * kTablePositions + static_cast<int>(threadIdx.x) / kTileHeads;
    for (; position < end; position += stride) {
        const size_t row = static_cast<size_t>(position) * half;
        for (int component = 0; component < kRopeComponents; ++component) {
            const int first = view.first_pair(component);
            float sum = 0.0F;
#pragma unroll 4
            for (int pair = first; pair < first + view.shape.mrope_section[component]; ++pair) {
                const float2 coefficient = shared.coefficients[pair][head];
                sum = fmaf(coefficient.x, view.buffers.cos_table[row + pair], sum);
                sum = fmaf(coefficient.y, view.buffers.sin_table[row + pair], sum);
            }
            view.table_of(group, tile, component)[position * kTileHeads + head] = sum;
        }
    }
}

// Grid: one block that stores and folds, then those that tabulate; KV heads of all sequences.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_codes(QuantizedView view) {
    auto& shared = shared_memory<PrepareShared>();
    const int group = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
    const NewRow<T> row(view, group);
    const bool tabulates = blockIdx.x > 0;
    const int end = row.sequence.position + 1, pairs = view.shape.head_dim / 2;
    const int first = (static_cast<int>(blockIdx.x) - 1) * kTablePositions;
    if (!row.sequence.valid || (tabulates && first >= end)) return;
    if (!tabulates) row.append();
    for (int tile = 0; tile < view.tiles; ++tile) {
        float2* to = tabulates ? &shared.coefficients[0][0] : view.coefficients_of(group, tile);
        for (int i = thread; i < pairs * kTileHeads; i += kPrepareThreads)
            to[i] = row.coefficient(tile * kTileHeads + i % kTileHeads, i / kTileHeads);
        if (!tabulates) {
            for (int head = warp_index(); head < kTileHeads; head += kPrepareThreads / kWarp)
                row.fold(tile, head);
            continue;
        }
        __syncthreads();
        tabulate(view, shared, group, tile, end);
        __syncthreads();
    }
}

}  // namespace starkv
