// SPDX-License-Identifier: Apache-2.0
// Sixteen rows of a cache of codes against eight query heads at a time, by one warp.
//
// As in attention_decode_tile.h nothing is staged, and every byte of a cache is read once. But rows, not
// heads, are the long side of the products, so that the usual eight heads of a KV head fill them:
//   scores [16 rows, 8 heads] = keys [16, D] * queries [D, 8]
//   out    [D, 8 heads]       = values [16, D] transposed * weights [16, 8]
// Weights become an operand by a transposition within the warp.
//
// Throughout, g = lane / 4 and t = lane % 4. A thread has keys g and g + 8, values 2t, 2t + 1, 2t + 8 and
// 2t + 9 (their eighth g), and of scores and out heads 2t and 2t + 1.
#pragma once

#include "mma.h"
#include "quantized_codes.h"
#include "quantized_view.h"

namespace starkv {

constexpr int kCodeRows = 16;

// A KV head's rows in one of the caches. Rows behind the last one are read as the last one.
struct CodeRows {
    const unsigned char* rows;
    int row_bytes, last;

    __device__ CodeRows(const QuantizedView& view, const void* cache, int group, int last_)
        : rows(static_cast<const unsigned char*>(cache) +
               static_cast<size_t>(group) * view.shape.capacity * view.row_bytes),
          row_bytes(view.row_bytes),
          last(last_) {}
    __device__ const unsigned char* row(int index) const {
        return rows + static_cast<size_t>(min(index, last)) * row_bytes;
    }
};

template <int kDim, int kBits>
struct KeyCodes {
    static constexpr int kRowBytes = kDim * kBits / 8;
    static constexpr int kSteps = key_words(kRowBytes) * Codes<kBits>::kStepsOfWord;
    LaneShare<kRowBytes / 4, 4> keys[2];

    __device__ void load(const CodeRows& rows, int first) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            keys[i].load(rows.row(first + lane_index() / 4 + 8 * i), lane_index() % 4);
    }

    // products[m] of rows g, g, g + 8, g + 8 with heads 2t, 2t + 1, 2t, 2t + 1 of tile m.
    template <int kTiles, int kTerms>
    __device__ void multiply(const uint2 (&queries)[kTiles][kTerms][kSteps][kWarp],
                             float (&products)[kTiles][4]) const {
#pragma unroll
        for (auto& tile : products)
            for (float& product : tile) product = 0.0F;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int word = step / Codes<kBits>::kStepsOfWord;
            const uint32_t upper = keys[0].words[word], lower = keys[1].words[word];
            const uint32_t operand[4] = {
                Codes<kBits>::key_pair(upper, step, 0), Codes<kBits>::key_pair(lower, step, 0),
                Codes<kBits>::key_pair(upper, step, 1), Codes<kBits>::key_pair(lower, step, 1)};
#pragma unroll
            for (int m = 0; m < kTiles; ++m)
#pragma unroll
                for (int term = 0; term < kTerms; ++term) {
                    const uint2 query = queries[m][term][step][lane_index()];
                    multiply_add<Half>(products[m], operand, {query.x, query.y});
                }
        }
    }
};

template <int kDim, int kBits>
struct ValueCodes {
    static constexpr int kRowBytes = kDim * kBits / 8;
    static constexpr int kPairs = kDim / 16;  // of a thread's columns
    LaneShare<kRowBytes / 8, 8> values[4];

    __device__ void load(const CodeRows& rows, int first) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            values[i].load(rows.row(first + lane_index() % 4 * 2 + i % 2 + i / 2 * 8), lane_index() / 4);
    }

    // out[m][n] += columns 2n, 2n, 2n + 1, 2n + 1 of the thread's, weighted for heads 2t, 2t + 1 in turn.
    template <int kTiles, int kTerms>
    __device__ void multiply(const uint32_t (&weights)[kTiles][kTerms][2],
                             float (&out)[kTiles][kPairs][4]) const {
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
            uint32_t operand[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                operand[i] =
                    Codes<kBits>::value_pair(values[i / 2 * 2].words, values[i / 2 * 2 + 1].words, n, i % 2);
#pragma unroll
            for (int m = 0; m < kTiles; ++m)
#pragma unroll
                for (int term = 0; term < kTerms; ++term)
                    multiply_add<Half>(out[m][n], operand, weights[m][term]);
        }
    }
};

// What the keys' bias adds to the scores of a KV head's rows.
struct BiasScores {
    const QuantizedView& view;
    const int32_t* positions;  // of the sequence's rows
    int group, last, end;      // last row; first position that is not tabulated

    __device__ BiasScores(const QuantizedView& view_, const QuantizedSequence& sequence, int group_)
        : view(view_),
          positions(view_.position(sequence.index, 0)),
          group(group_),
          last(sequence.held),
          end(sequence.position + 1) {}

    // Positions of rows g and g + 8 of those from `first` on.
    __device__ void load(int first, int (&found)[2][kRopeComponents]) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = min(first + lane_index() / 4 + 8 * i, last);
#pragma unroll
            for (int component = 0; component < kRopeComponents; ++component)
                found[i][component] = positions[static_cast<size_t>(row) * kRopeComponents + component];
        }
    }

    // What tables hold for heads 2t and 2t + 1 of a tile. Positions that have no place in them are read as
    // ones that have: nothing is decided before all reads are on their way.
    __device__ void look_up(const int (&found)[2][kRopeComponents], int tile,
                            float2 (&parts)[2][kRopeComponents]) const {
#pragma unroll
        for (int component = 0; component < kRopeComponents; ++component) {
            const float* table = view.table_of(group, tile, component) + lane_index() % 4 * 2;
#pragma unroll
            for (int i = 0; i < 2; ++i)
                parts[i][component] = *reinterpret_cast<const float2*>(
                    table + static_cast<size_t>(in_table(found[i][component])) * kTileHeads);
        }
    }

    __device__ float2 sum(const int (&position)[kRopeComponents], int tile,
                          const float2 (&parts)[kRopeComponents]) const {
        bool tabulated = true;
        float2 result{0.0F, 0.0F};
#pragma unroll
        for (int component = 0; component < kRopeComponents; ++component) {
            tabulated = tabulated && position[component] == in_table(position[component]);
            result = make_float2(result.x + parts[component].x, result.y + parts[component].y);
        }
        return tabulated ? result : worked_out(position, tile);
    }

private:
    __device__ int in_table(int position) const { return max(0, min(position, end - 1)); }

    // What tables would have held.
    __device__ float2 worked_out(const int (&position)[kRopeComponents], int tile) const {
        const float2* coefficients = view.coefficients_of(group, tile) + lane_index() % 4 * 2;
        float2 result{0.0F, 0.0F};
        int pair = 0;
        // Unrolled, so that positions stay in registers.
#pragma unroll
        for (int component = 0; component < kRopeComponents; ++component) {
            const int own = position[component];
            if (own < 0 || own >= view.shape.table_rows) return make_float2(NAN, NAN);
            const size_t row = static_cast<size_t>(own) * (view.shape.head_dim / 2);
#pragma unroll 1
            for (const int next = pair + view.shape.mrope_section[component]; pair < next; ++pair) {
                const float cosine = view.buffers.cos_table[row + pair];
                const float sine = view.buffers.sin_table[row + pair];
                const float2 a = coefficients[pair * kTileHeads], b = coefficients[pair * kTileHeads + 1];
                result.x = fmaf(a.x, cosine, fmaf(a.y, sine, result.x));
                result.y = fmaf(b.x, cosine, fmaf(b.y, sine, result.y));
            }
        }
        return result;
    }
};

}  // namespace starkv
