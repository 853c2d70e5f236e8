// SPDX-License-Identifier: Apache-2.0
// Scores of each KV head: the window's attention pooled along the rows, plus the boost of rows with large
// hidden states (docs/spec/star-kv.md §1, steps 3 to 7).
#pragma once

#include "block.h"
#include "compress_view.h"

namespace starkv {

constexpr int kRowThreads = 256;

// One block for each sequence: what the boost needs to know of the screenshot's hidden norms.
__global__ void __launch_bounds__(kRowThreads) norm_statistics(CompressView view) {
    const Sequence sequence(view, static_cast<int>(blockIdx.x));
    const Plan& plan = view.plan();
    if (!sequence.valid || sequence.cells == 0 || !(plan.boost > 0.0F)) return;
    auto& scratch = shared_memory<BlockScratch<float>>();
    const float* norms = view.buffers.hidden_norm + static_cast<size_t>(sequence.index) * view.shape.capacity;
    const auto each = [&](auto work) {
        for (int cell = static_cast<int>(threadIdx.x); cell < sequence.cells;
             cell += static_cast<int>(blockDim.x))
            work(norms[sequence.start + cell]);
    };
    NormStatistics result{};
    float sum = 0.0F;
    each([&](float norm) { sum += norm; });
    result.mean = block_sum(sum, scratch) / static_cast<float>(sequence.cells);
    float squares = 0.0F;
    each([&](float norm) { squares += (norm - result.mean) * (norm - result.mean); });
    // Of a single cell there is no deviation.
    const float freedom = static_cast<float>(max(sequence.cells - 1, 1));
    result.spread = sqrtf(block_sum(squares, scratch) / freedom) + 1e-8F;
    float greatest = -INFINITY;
    each([&](float norm) {
        greatest = fmaxf(greatest, (norm - result.mean) / result.spread / plan.boost_temperature);
    });
    result.greatest = block_max(greatest, scratch);
    float total = 0.0F;
    each([&](float norm) {
        total += expf((norm - result.mean) / result.spread / plan.boost_temperature - result.greatest);
    });
    result.total = block_sum(total, scratch);
    if (threadIdx.x == 0) view.norms[sequence.index] = result;
}

// Attention of the window to the rows around one, for one KV head: mean over its query heads, pooled.
__device__ inline float pooled_mass(const CompressView& view, const float* mass, int row, int past) {
    const int reach = view.shape.pooling_kernel / 2;
    const int first = max(row - reach, 0), last = min(row + reach, past - 1);
    float sum = 0.0F;
    for (int block = 0; block < view.blocks_per_group; ++block) {
        const float* rows = mass + static_cast<size_t>(block) * view.shape.capacity;
        float pooled = 0.0F;
        for (int near = first; near <= last; ++near) {
            const float value = rows[near];
            if (view.shape.pooling == STARKV_AVGPOOL)
                pooled += value;
            else if (!(pooled >= value))  // and where it is no number
                pooled = value;
        }
        sum += pooled;
    }
    const float mean = sum / static_cast<float>(view.sharing());
    // Zeros beside the rows count in the mean.
    return view.shape.pooling == STARKV_AVGPOOL ? mean / static_cast<float>(view.shape.pooling_kernel) : mean;
}

// A block for kRowsPerBlock rows of a sequence.
__global__ void __launch_bounds__(kRowThreads) group_scores(CompressView view) {
    const Sequence sequence(view, static_cast<int>(blockIdx.y));
    if (!sequence.valid) return;
    auto& scratch = shared_memory<BlockScratch<float>>();
    const Plan& plan = view.plan();
    const int capacity = view.shape.capacity, groups = view.shape.kv_heads;
    const size_t rows = static_cast<size_t>(sequence.index) * capacity;
    const bool boosted = sequence.cells > 0 && plan.boost > 0.0F;
    const NormStatistics norms = boosted ? view.norms[sequence.index] : NormStatistics{};
    const int first = static_cast<int>(blockIdx.x) * kRowsPerBlock,
              end = min(first + kRowsPerBlock, sequence.past);
    float sum = 0.0F;
    for (int row = first + static_cast<int>(threadIdx.x); row < end; row += kRowThreads) {
        float boost = 0.0F;
        if (boosted && row >= sequence.start && row < sequence.start + sequence.cells) {
            const float norm = view.buffers.hidden_norm[rows + row];
            const float logit = (norm - norms.mean) / norms.spread / plan.boost_temperature;
            boost = plan.boost * (expf(logit - norms.greatest) / norms.total);
        }
        float plain = 0.0F, base = 0.0F;
        for (int group = 0; group < groups; ++group) {
            const float pooled = pooled_mass(view, view.mass_rows(sequence.index, group), row, sequence.past);
            view.group_rows(sequence.index, group)[row] = pooled + boost;
            plain += pooled;
            base += pooled + boost;
        }
        base /= static_cast<float>(groups);
        view.base[rows + row] = base;
        sum += base;
        if (float* stages = view.buffers.stages) {
            stages += static_cast<size_t>(sequence.index) * 4 * capacity;
            stages[row] = plain / static_cast<float>(groups);
            stages[capacity + row] = base;
        }
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0)
        view.base_sums[static_cast<size_t>(sequence.index) * view.row_chunks + blockIdx.x] = sum;
}

}  // namespace starkv
