// SPDX-License-Identifier: Apache-2.0
// Attention of one new token to a cache of codes: blocks share the rows of every KV head, another kernel
// merges their results. All rows are in the cache by now, the new one, too.
#pragma once

#include "quantized_tile.h"

namespace starkv {

template <int kDim, int kBits, int kTerms, int kTiles>
struct QuantizedShared {
    static constexpr int kHeads = kTiles * kTileHeads;
    uint2 queries[kTiles][kTerms][KeyCodes<kDim, kBits>::kSteps][kWarp];
    float factors[kHeads];
    RunningSoftmax softmax[kAttentionWarps][kHeads];
    // Rows are longer than they need be, which spreads heads over the banks.
    alignas(16) float out[kAttentionWarps][kHeads][kDim + 4];

    __device__ void load(const QuantizedView& view, int group, int first_tile) {
        constexpr int kQueries = sizeof(queries) / sizeof(uint4);
        const auto* from = reinterpret_cast<const uint4*>(view.queries_of(group, first_tile));
        for (int i = static_cast<int>(threadIdx.x); i < kQueries; i += kAttentionThreads)
            reinterpret_cast<uint4*>(queries)[i] = from[i];
        if (static_cast<int>(threadIdx.x) < kHeads)
            factors[threadIdx.x] = view.factors_of(group, first_tile)[threadIdx.x];
    }
};

// What one warp gathered of its rows: in every tile heads 2t and 2t + 1, in the layout of ValueCodes.
template <int kDim, int kBits, int kTerms, int kTiles>
struct QuantizedState {
    using Shared = QuantizedShared<kDim, kBits, kTerms, kTiles>;
    using Values = ValueCodes<kDim, kBits>;
    RunningSoftmax softmax[kTiles][2];
    float out[kTiles][Values::kPairs][4];

    __device__ QuantizedState() {
#pragma unroll
        for (auto& tile : out)
            for (auto& pair : tile)
                for (float& sum : pair) sum = 0.0F;
    }

    // Turns scores of rows g and g + 8 with heads 2t and 2t + 1, of which rows from `end` on are hidden, into
    // weights as the tensor cores take them, and scales what was before.
    __device__ void weigh(int tile, const float (&scores)[4], int first, int end,
                          uint32_t (&weights)[kTerms][2]) {
        // The greatest weight: the others keep more of their digits in 16 bits, and cancel with it at the
        // end.
        constexpr float kWeightBits = 10.0F;
        float weight[4];
#pragma unroll
        for (int head = 0; head < 2; ++head) {
            float visible[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                visible[i] = first + lane_index() / 4 + 8 * i < end ? scores[2 * i + head] : -INFINITY;
            float greatest = fmaxf(visible[0], visible[1]);
#pragma unroll
            for (int lanes = 4; lanes < kWarp; lanes *= 2)
                greatest = fmaxf(greatest, shfl_xor(greatest, lanes));
            RunningSoftmax& own = softmax[tile][head];
            const float factor = own.raise(greatest, 1.0F);
#pragma unroll
            for (auto& pair : out[tile]) {
                pair[head] *= factor;
                pair[2 + head] *= factor;
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                weight[2 * i + head] = power_of_two(visible[i] - own.greatest + kWeightBits);
                own.sum += weight[2 * i + head];
            }
        }
#pragma unroll
        for (int term = 0; term < kTerms; ++term)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t pair = pack<Half>(weight[2 * i], weight[2 * i + 1]);
                weights[term][i] = transpose_matrix(pair);
                weight[2 * i] -= unpack_first<Half>(pair);
                weight[2 * i + 1] -= unpack_second<Half>(pair);
            }
    }

    // Puts the warp's part where the block finds it, relative to the largest score of all warps.
    __device__ void share(Shared& shared) {
        const int g = lane_index() / 4, own_head = lane_index() % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int head = 0; head < 2; ++head) {
                RunningSoftmax& own = softmax[tile][head];
                for (int lanes = 4; lanes < kWarp; lanes *= 2) own.sum += shfl_xor(own.sum, lanes);
                if (g == 0) shared.softmax[warp_index()][tile * kTileHeads + own_head + head] = own;
            }
        __syncthreads();
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int head = 0; head < 2; ++head) {
                const int of_block = tile * kTileHeads + own_head + head;
                float greatest = -FLT_MAX;
                for (const auto& warp : shared.softmax) greatest = fmaxf(greatest, warp[of_block].greatest);
                const float factor = power_of_two(softmax[tile][head].greatest - greatest);
                float* row = shared.out[warp_index()][of_block];
#pragma unroll
                for (int i = 0; i < 2 * Values::kPairs; ++i)
                    row[value_column<kBits>(Values::kRowBytes, g, i)] =
                        out[tile][i / 2][i % 2 * 2 + head] * factor;
            }
        __syncthreads();
    }
};

// Blocks of so many threads that a multiprocessor is to hold at once, as registers allow.
constexpr int blocks_of_decoding(int dim, int terms, int tiles) {
    if (dim > 128) return 2;
    return tiles * terms > 1 ? 3 : 4;
}

// Grid: splits, blocks of tiles of heads, KV heads of all sequences.
template <int kDim, int kBits, int kTerms, int kTiles>
__global__ void __launch_bounds__(kAttentionThreads, blocks_of_decoding(kDim, kTerms, kTiles))
    decode_codes_kernel(QuantizedView view) {
    const int split = static_cast<int>(blockIdx.x), group = static_cast<int>(blockIdx.z);
    const QuantizedSequence sequence(view, view.sequence_of(group));
    if (!sequence.valid) return;
    const DecodeSplits splits(view.parts.splits, sequence.held + 1);
    if (split >= splits.used) return;

    const int first_tile = static_cast<int>(blockIdx.y) * kTiles;
    const int end = min(splits.first_row(split + 1), sequence.held + 1);
    int row = splits.first_row(split) + warp_index() * kCodeRows;
    const CodeRows key_rows(view, view.buffers.present_k, group, sequence.held);
    const CodeRows value_rows(view, view.buffers.present_v, group, sequence.held);
    const BiasScores bias(view, sequence, group);

    // The next tile's codes and positions are on their way while this one's are multiplied.
    KeyCodes<kDim, kBits> keys;
    ValueCodes<kDim, kBits> values;
    int positions[2][kRopeComponents];
    if (row < end) {
        bias.load(row, positions);
        keys.load(key_rows, row);
        values.load(value_rows, row);
    }
    auto& shared = shared_memory<QuantizedShared<kDim, kBits, kTerms, kTiles>>();
    shared.load(view, group, first_tile);
    __syncthreads();

    QuantizedState<kDim, kBits, kTerms, kTiles> state;
#pragma unroll 1
    for (; row < end; row += kDecodeRows) {
        float2 parts[kTiles][2][kRopeComponents], added[kTiles][2];
        float products[kTiles][4];
        uint32_t weights[kTiles][kTerms][2];
        const int next = row + kDecodeRows;
        const auto add_up = [&](int tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                added[tile][i] = bias.sum(positions[i], first_tile + tile, parts[tile][i]);
            // Lanes that had to work something out may be behind, and products take the whole warp.
            __syncwarp();
        };
        // With one tile, registers suffice for what is looked up to arrive while keys are multiplied.
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            bias.look_up(positions, first_tile + tile, parts[tile]);
            if (kTiles > 1) add_up(tile);
        }
        keys.multiply(shared.queries, products);
        if (kTiles == 1) add_up(0);
        if (next < end) {
            bias.load(next, positions);
            keys.load(key_rows, next);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const float* factors = shared.factors + tile * kTileHeads + lane_index() % 4 * 2;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                products[tile][2 * i] = fmaf(products[tile][2 * i], factors[0], added[tile][i].x);
                products[tile][2 * i + 1] = fmaf(products[tile][2 * i + 1], factors[1], added[tile][i].y);
            }
            state.weigh(tile, products[tile], row, end, weights[tile]);
        }
        values.multiply(weights, state.out);
        if (next < end) values.load(value_rows, next);
    }
    state.share(shared);
    const int first_shared = first_tile * kTileHeads;
    const size_t first_head = static_cast<size_t>(group) * view.sharing + first_shared;
    store_partial<kDim>(view.parts, shared, first_head, min(kTiles * kTileHeads, view.sharing - first_shared),
                        split);
}

template <int kDim, int kBits, int kTerms, int kTiles>
bool decode_codes(const QuantizedView& view, Stream stream) {
    using Shared = QuantizedShared<kDim, kBits, kTerms, kTiles>;
    const auto groups = static_cast<unsigned>(view.shape.sequences * view.shape.kv_heads);
    const dim3 grid(static_cast<unsigned>(view.parts.splits), static_cast<unsigned>(view.tiles / kTiles),
                    groups);
    return launch(decode_codes_kernel<kDim, kBits, kTerms, kTiles>, grid, kAttentionThreads, sizeof(Shared),
                  stream, view);
}

template <int kDim, int kBits>
bool decode_codes(const QuantizedView& view, Stream stream) {
    if (view.terms == 1)
        return view.block_tiles == 1 ? decode_codes<kDim, kBits, 1, 1>(view, stream)
                                     : decode_codes<kDim, kBits, 1, 2>(view, stream);
    return view.block_tiles == 1 ? decode_codes<kDim, kBits, 2, 1>(view, stream)
                                 : decode_codes<kDim, kBits, 2, 2>(view, stream);
}

template <int kBits>
bool decode_codes(const QuantizedView& view, Stream stream) {
    switch (view.shape.head_dim) {
        case 64:
            return decode_codes<64, kBits>(view, stream);
        case 80:
            return decode_codes<80, kBits>(view, stream);
        case 96:
            return decode_codes<96, kBits>(view, stream);
        case 128:
            return decode_codes<128, kBits>(view, stream);
        default:
            return decode_codes<256, kBits>(view, stream);
    }
}

}  // namespace starkv
