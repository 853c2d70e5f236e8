// SPDX-License-Identifier: Apache-2.0
// Merges what blocks of decoding found out about parts of a sequence.
#pragma once

#include "attention_view.h"
#include "block.h"

namespace starkv {

constexpr int kMergeThreads = 256;

template <int kDim>
struct MergeShared {
    static constexpr int kVectors = kDim / 4;
    // So many splits are added up side by side.
    static constexpr int kRows = kMergeThreads / kVectors;
    BlockScratch<float> scratch;
    float weights[kMostSplits];
    float4 sums[kRows][kVectors];
};

// A head's sum of weighted values over all its parts, divided by the sum of weights. Threads below kVectors
// get four columns of it each; all threads of the block take part. Without parts it is 0.
template <int kDim>
__device__ float4 merge_parts(MergeShared<kDim>& shared, const AttentionParts& parts, size_t head,
                              int splits) {
    using Shared = MergeShared<kDim>;
    const int thread = static_cast<int>(threadIdx.x);
    const size_t first = head * parts.splits;
    float greatest = -FLT_MAX, sum = 0.0F;
    for (int split = thread; split < splits; split += kMergeThreads)
        greatest = fmaxf(greatest, parts.softmax[first + split].x);
    greatest = block_max(greatest, shared.scratch);
    for (int split = thread; split < splits; split += kMergeThreads) {
        const float2 softmax = parts.softmax[first + split];
        shared.weights[split] = power_of_two(softmax.x - greatest);
        sum += softmax.y * shared.weights[split];
    }
    sum = block_sum(sum, shared.scratch);

    const int row = thread / Shared::kVectors, vector = thread % Shared::kVectors;
    if (row < Shared::kRows) {
        float4 own{0.0F, 0.0F, 0.0F, 0.0F};
        const auto* out = reinterpret_cast<const float4*>(parts.out + first * kDim) + vector;
#pragma unroll 4
        for (int split = row; split < splits; split += Shared::kRows) {
            const float4 part = out[split * Shared::kVectors];
            const float weight = shared.weights[split];
            own.x = fmaf(part.x, weight, own.x);
            own.y = fmaf(part.y, weight, own.y);
            own.z = fmaf(part.z, weight, own.z);
            own.w = fmaf(part.w, weight, own.w);
        }
        shared.sums[row][vector] = own;
    }
    __syncthreads();
    float4 total = shared.sums[0][vector];
    for (int other = 1; other < Shared::kRows; ++other) {
        const float4 part = shared.sums[other][vector];
        total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
    }
    const float share = splits ? 1.0F / sum : 0.0F;
    return {total.x * share, total.y * share, total.z * share, total.w * share};
}

// Grid: query heads, sequences.
template <class T, int kDim>
__global__ void __launch_bounds__(kMergeThreads) merge_attention(AttentionView view) {
    using Shared = MergeShared<kDim>;
    const AttentionSequence sequence(view, static_cast<int>(blockIdx.y));
    const int head = static_cast<int>(blockIdx.x), vector = static_cast<int>(threadIdx.x);
    const int splits = sequence.valid ? DecodeSplits(view.parts.splits, sequence.held + 1).used : 0;
    const size_t of_all = static_cast<size_t>(sequence.index) * view.shape.query_heads + head;
    const float4 merged = merge_parts(shared_memory<Shared>(), view.parts, of_all, splits);
    if (vector >= Shared::kVectors) return;
    auto* out = static_cast<T*>(view.buffers.out) + view.query_offset(sequence.index, 0, head);
    reinterpret_cast<uint2*>(out)[vector] =
        make_uint2(pack<T>(merged.x, merged.y), pack<T>(merged.z, merged.w));
}

}  // namespace starkv
