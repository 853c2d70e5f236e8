// SPDX-License-Identifier: Apache-2.0
// Entropy of each layer's scores, and the rows that each layer gets by it (docs/spec/star-kv.md §5, LayerRows in
// starkv/onnx_compact.py).
#pragma once

#include "block.h"
#include "compress_view.h"

namespace starkv {

constexpr int kEntropyThreads = 512;
constexpr int kBudgetThreads = 128;

// A block for each sequence of each layer.
__global__ void __launch_bounds__(kEntropyThreads) score_entropy(CompressView view) {
    const Sequence sequence(view, static_cast<int>(blockIdx.x));
    auto& scratch = shared_memory<BlockScratch<float>>();
    const Plan& plan = view.plan();
    const int thread = static_cast<int>(threadIdx.x);
    const float before = view.buffers.temperature[sequence.index];
    if (!sequence.valid) {
        if (thread == 0) {
            view.needed[sequence.index] = 1.0F;
            view.buffers.new_temperature[sequence.index] = before;
        }
        return;
    }
    float sum = 0.0F;
    const float* sums = view.base_sums + static_cast<size_t>(sequence.index) * view.row_chunks;
    for (int chunk = thread; chunk < ceil_div(sequence.past, kRowsPerBlock); chunk += kEntropyThreads)
        sum += sums[chunk];
    const float total = fmaxf(block_sum(sum, scratch), 1e-8F);
    const float* base = view.base + static_cast<size_t>(sequence.index) * view.shape.capacity;
    float surprise = 0.0F;
    for (int row = thread; row < sequence.past; row += kEntropyThreads) {
        const float share = base[row] / total;
        surprise -= share * logf(share + 1e-8F);
    }
    const float entropy = block_sum(surprise, scratch);
    if (thread == 0) {
        const double most = log(static_cast<double>(sequence.past));
        const float normalized = entropy / static_cast<float>(most + 1e-8);
        view.needed[sequence.index] = expf(normalized * static_cast<float>(most));
        const float fresh = plan.entropy_min + (plan.entropy_max - plan.entropy_min) * normalized;
        view.buffers.new_temperature[sequence.index] =
            plan.entropy_smooth * before + (1.0F - plan.entropy_smooth) * fresh;
    }
}

// Rows between floor and ceiling that a layer gets at a factor.
__host__ __device__ inline double share_at(double factor, double weight, double floor_rows, double ceiling_rows) {
    const double share = factor * weight;
    return share < floor_rows ? floor_rows : share > ceiling_rows ? ceiling_rows : share;
}

struct BudgetShared {
    BlockScratch<double> scratch;
    double weights[1];  // one for each layer
};

// A block for each sequence: mean * L rows in all, in proportion to what layers need.
__global__ void __launch_bounds__(kBudgetThreads) layer_budgets(CompressView view) {
    auto& shared = shared_memory<BudgetShared>();
    double* weights = shared.weights;
    const int sequence = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    const int layers = view.shape.layers, sequences = view.shape.sequences;
    const double mean = static_cast<double>(view.buffers.limits[0]);
    const double least = static_cast<double>(view.buffers.limits[1]), most = static_cast<double>(view.buffers.limits[2]);
    for (int layer = thread; layer < layers; layer += kBudgetThreads) {
        const float needed = view.needed[layer * sequences + sequence];
        weights[layer] = needed == needed ? static_cast<double>(needed) : 1.0;
    }
    __syncthreads();
    // The total as a function of the factor is piecewise linear, with knees where a layer meets a limit.
    const double wanted = mean * layers;
    double low = 0.0, low_total = 0.0, high = INFINITY, high_total = INFINITY;
    for (int knee = thread; knee < 2 * layers; knee += kBudgetThreads) {
        const double factor = (knee < layers ? least : most) / weights[knee % layers];
        double total = 0.0;
        for (int layer = 0; layer < layers; ++layer) total += share_at(factor, weights[layer], least, most);
        // A knee's own total is only as exact as a division and a multiplication.
        if (total <= wanted + 1e-6) {
            low = factor > low ? factor : low;
            low_total = total > low_total ? total : low_total;
        }
        if (total >= wanted - 1e-6) {
            high = factor < high ? factor : high;
            high_total = total < high_total ? total : high_total;
        }
    }
    const auto larger = [](double a, double b) { return a > b ? a : b; };
    const auto smaller = [](double a, double b) { return a < b ? a : b; };
    low = block_reduce(low, shared.scratch, larger);
    low_total = block_reduce(low_total, shared.scratch, larger);
    high = block_reduce(high, shared.scratch, smaller);
    high_total = block_reduce(high_total, shared.scratch, smaller);
    if (thread != 0) return;
    const double way = smaller(larger((wanted - low_total) / larger(high_total - low_total, 1e-9), 0.0), 1.0);
    const double factor = low + way * (high - low);
    double running = 0.0, given = 0.0;
    for (int layer = 0; layer < layers; ++layer) {
        running += share_at(factor, weights[layer], least, most);
        const double up_to_here = floor(running + 0.5);
        view.competing[layer * sequences + sequence] = static_cast<int>(up_to_here - given);
        given = up_to_here;
    }
}

}  // namespace starkv
