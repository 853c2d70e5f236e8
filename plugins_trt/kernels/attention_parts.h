// SPDX-License-Identifier: Apache-2.0
// What blocks of decoding find out about parts of a sequence, in the workspace until it is merged.
#pragma once

#include "host.h"
#include "running_softmax.h"

namespace starkv {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
// Rows that the warps of a block of decoding take at once, 16 each.
constexpr int kDecodeRows = kAttentionWarps * 16;
// More would be more blocks than a GPU holds at once.
constexpr int kMostSplits = 512;

struct AttentionParts {
    int splits;       // among so many blocks the rows of a KV head are split at most
    float* out;       // [B, H, splits, D]: sums of values with weights relative to the part's largest score
    float2* softmax;  // [B, H, splits]: that score, sum of weights

    // For `blocks` groups of heads whose rows are split, of `heads` heads in all.
    static AttentionParts lay_out(int blocks, int heads, int dim, int capacity, Workspace& workspace) {
        // Blocks that a large GPU (132 multiprocessors) holds at once. A constant, so that the same call
        // always is split alike: results repeat, and a captured graph fits every length.
        constexpr int kWantedBlocks = 132 * 3;
        static_assert(kWantedBlocks <= kMostSplits, "the merger has room for all splits");
        const int splits = std::min(std::max(1, kWantedBlocks / blocks), ceil_div(capacity, kDecodeRows));
        const size_t parts = static_cast<size_t>(heads) * splits;
        auto* const out = workspace.take<float>(parts * dim);
        return {splits, out, workspace.take<float2>(parts)};
    }
};

// How a sequence's rows are split while decoding: as evenly as whole steps of a block allow.
struct DecodeSplits {
    int steps, used;

    __device__ DecodeSplits(int most_splits, int rows) : steps(ceil_div(rows, kDecodeRows)) {
        used = min(steps, most_splits);
    }
    __device__ int first_row(int split) const { return split * steps / used * kDecodeRows; }
};

// Joins what a block's warps shared about `heads` heads and leaves it for the merger. Shared memory has for
// each warp and head `softmax` and the row `out`, relative to the largest score of all warps.
template <int kDim, class Shared>
__device__ void store_partial(const AttentionParts& parts, const Shared& shared, size_t first_head, int heads,
                              int split) {
    constexpr int kVectors = kDim / 4;
    for (int i = static_cast<int>(threadIdx.x); i < heads * kVectors; i += kAttentionThreads) {
        const int head = i / kVectors, column = i % kVectors * 4;
        float4 sum{0.0F, 0.0F, 0.0F, 0.0F};
#pragma unroll
        for (int warp = 0; warp < kAttentionWarps; ++warp) {
            const float4 part = *reinterpret_cast<const float4*>(&shared.out[warp][head][column]);
            sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
        }
        const size_t row = (first_head + head) * parts.splits + split;
        *reinterpret_cast<float4*>(parts.out + row * kDim + column) = sum;
    }
    const int head = static_cast<int>(threadIdx.x);
    if (head >= heads) return;
    float greatest = -FLT_MAX, sum = 0.0F;
    for (const auto& warp : shared.softmax) greatest = fmaxf(greatest, warp[head].greatest);
    for (const auto& warp : shared.softmax)
        sum += warp[head].sum * power_of_two(warp[head].greatest - greatest);
    parts.softmax[(first_head + head) * parts.splits + split] = make_float2(greatest, sum);
}

}  // namespace starkv
