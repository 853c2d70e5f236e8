// SPDX-License-Identifier: Apache-2.0
// Attention of one new token: blocks share the rows of every KV head, another kernel merges their results.
//
// All blocks that need the new row take it from k and v; one of them stores it. So no block waits for
// another, and none reads what another one writes.
#pragma once

#include "attention_decode_tile.h"
#include "running_softmax.h"

namespace starkv {

template <class T, int kDim>
struct DecodeShared {
    // Spreads the rows of heads over the banks.
    static constexpr int kOutStride = kDim + 4;
    QueryFragments<T, kDim, 1> heads;
    RunningSoftmax softmax[kAttentionWarps][kDecodeHeads];
    alignas(16) float out[kAttentionWarps][kDecodeHeads][kOutStride];
};

// What one warp gathered of its rows: of heads g and g + 8, in the layout of DecodeValues.
template <class T, int kDim>
struct DecodeState {
    RunningSoftmax softmax[2];
    float out[kDim / 8][4];

    __device__ DecodeState() {
#pragma unroll
        for (auto& tile : out)
            for (float& sum : tile) sum = 0.0F;
    }

    // Turns products with 16 rows, `first` being the first of them, into weights, and scales what was before.
    __device__ void weigh(const float (&products)[2][4], int first, int end, uint32_t (&weights)[4]) {
        const float scale = score_scale(kDim);
#pragma unroll
        for (int head = 0; head < 2; ++head) {
            float visible[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = first + i / 2 * 8 + lane_index() % 4 * 2 + i % 2;
                visible[i] = row < end ? products[i / 2][2 * head + i % 2] : -INFINITY;
            }
            float greatest = fmaxf(fmaxf(visible[0], visible[1]), fmaxf(visible[2], visible[3]));
            greatest = fmaxf(greatest, shfl_xor(greatest, 1));
            greatest = fmaxf(greatest, shfl_xor(greatest, 2));
            const float factor = softmax[head].raise(greatest, scale);
#pragma unroll
            for (auto& tile : out) {
                tile[2 * head] *= factor;
                tile[2 * head + 1] *= factor;
            }
#pragma unroll
            for (float& value : visible) value = softmax[head].weigh(value, scale);
            weights[head] = pack<T>(visible[0], visible[1]);
            weights[2 + head] = pack<T>(visible[2], visible[3]);
        }
    }

    // Puts the warp's part where the block finds it, relative to the largest score of all warps.
    __device__ void share(DecodeShared<T, kDim>& shared, int heads) {
        const int group = lane_index() / 4, thread = lane_index() % 4;
#pragma unroll
        for (int head = 0; head < 2; ++head) {
            softmax[head].sum += shfl_xor(softmax[head].sum, 1);
            softmax[head].sum += shfl_xor(softmax[head].sum, 2);
            if (thread == 0) shared.softmax[warp_index()][group + 8 * head] = softmax[head];
        }
        __syncthreads();
#pragma unroll
        for (int head = 0; head < 2; ++head) {
            float greatest = -FLT_MAX;
            for (const auto& warp : shared.softmax)
                greatest = fmaxf(greatest, warp[group + 8 * head].greatest);
            const float factor = power_of_two(softmax[head].greatest - greatest);
            if (group + 8 * head < heads)
                DecodeValues<T, kDim>::store(out, head, factor, shared.out[warp_index()][group + 8 * head]);
        }
        __syncthreads();
    }
};

// Grid: splits, blocks of query heads, KV heads of all sequences. There is one new token, so that a
// sequence's heads lie behind those of the one before in all tensors.
template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, kDim <= 128 ? 3 : 2)
    decode_attention(AttentionView view) {
    const int split = static_cast<int>(blockIdx.x), group = static_cast<int>(blockIdx.z);
    const AttentionSequence sequence(view, group / view.shape.kv_heads);
    if (!sequence.valid) return;
    const DecodeSplits splits(view.parts.splits, sequence.held + 1);
    if (split >= splits.used) return;

    const int first_shared = static_cast<int>(blockIdx.y) * kDecodeHeads;
    const int heads = min(kDecodeHeads, view.sharing - first_shared);
    const size_t first_head = static_cast<size_t>(group) * view.sharing + first_shared;
    const DecodeRows<T, kDim> rows(view, group, sequence.held);
    const int end = min(splits.first_row(split + 1), rows.end());
    int row = splits.first_row(split) + warp_index() * kTileRows;

    // Keys of the next tile are on their way while this one's values are multiplied, and the other way round.
    // With wider heads, registers don't suffice for both.
    constexpr bool kAhead = kDim <= 128;
    const auto key_of = [&](int own) { return rows.key(own); };
    KeyTile<T, kDim> key_tile;
    DecodeValues<T, kDim> value_tile;
    if (kAhead && row < end) {
        key_tile.load(key_of, row);
        value_tile.load(rows, row);
    }
    auto& shared = shared_memory<DecodeShared<T, kDim>>();
    shared.heads.load(static_cast<const T*>(view.buffers.q) + first_head * kDim, heads);
    if (split == splits.used - 1 && first_shared == 0) rows.store_newest();
    __syncthreads();

    DecodeState<T, kDim> state;
#pragma unroll 1
    for (; row < end; row += kDecodeRows) {
        TileProducts<1> products;
        uint32_t weights[4];
        const int next = row + kDecodeRows;
        if (!kAhead) key_tile.load(key_of, row);
        key_tile.multiply(shared.heads, kDecodeHeads, products);
        if (kAhead && next < end) key_tile.load(key_of, next);
        if (!kAhead) value_tile.load(rows, row);
        state.weigh(products[0], row, end, weights);
        value_tile.multiply(weights, state.out);
        if (kAhead && next < end) value_tile.load(rows, next);
    }
    state.share(shared, heads);
    store_partial<kDim>(view.parts, shared, first_head, heads, split);
}

}  // namespace starkv
