// SPDX-License-Identifier: Apache-2.0
// Entropy of each layer's scores, and the rows that each layer gets by it (docs/spec/star-kv.md §5, LayerRows
// in starkv/onnx_compact.py).
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
    const int thread = static_cast<int>(threadIdx.x);
    if (!sequence.valid) return;
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
        view.entropy[sequence.index] = normalized;
        view.needed[sequence.index] = expf(normalized * static_cast<float>(most));
    }
}

// Rows between floor and ceiling that a layer gets at a factor.
__host__ __device__ inline double share_at(double factor, double weight, double floor_rows,
                                           double ceiling_rows) {
    const double share = factor * weight;
    return share < floor_rows ? floor_rows : share > ceiling_rows ? ceiling_rows : share;
}

struct BudgetShared {
    BlockScratch<double> scratch;
    bool fits;
    double weights[1];  // one for each layer
};

// Gives every layer of a sequence its rows at a factor; by one thread. Whether they are there, and fit the
// slot.
__device__ inline bool give_rows(const CompressView& view, int sequence, double factor,
                                 const double* weights) {
    const int64_t* limits = view.buffers.limits;
    double running = 0.0, given = 0.0;
    bool fits = true;
    for (int layer = 0; layer < view.shape.layers; ++layer) {
        const int index = layer * view.shape.sequences + sequence;
        running +=
            share_at(factor, weights[layer], static_cast<double>(limits[1]), static_cast<double>(limits[2]));
        const double up_to_here = floor(running + 0.50000095367431640625), rows = up_to_here - given;
        const int past = view.buffers.kv_len[index] - view.shape.window;
        fits = fits && rows >= 0.0 && rows <= past && rows + view.shape.window <= view.shape.slot_capacity;
        view.competing[index] = fits ? static_cast<int>(rows) : 0;
        given = up_to_here;
    }
    return fits;
}

// Of a sequence that is compressed, else as it was; all layers' by all threads.
__device__ inline void update_temperature(const CompressView& view, int sequence, bool compressed) {
    const Plan& plan = view.plan();
    for (int layer = static_cast<int>(threadIdx.x); layer < view.shape.layers; layer += kBudgetThreads) {
        const int index = layer * view.shape.sequences + sequence;
        const float before = view.buffers.temperature[index];
        const float fresh = plan.entropy_min + (plan.entropy_max - plan.entropy_min) * view.entropy[index];
        const float average = plan.entropy_smooth * before + (1.0F - plan.entropy_smooth) * fresh;
        view.buffers.new_temperature[index] = compressed ? average : before;
    }
}

// A block for each sequence: mean * L rows in all, in proportion to what layers need.
__global__ void __launch_bounds__(kBudgetThreads) layer_budgets(CompressView view) {
    auto& shared = shared_memory<BudgetShared>();
    double* weights = shared.weights;
    const int sequence = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    if (!view.accepted[sequence]) {
        update_temperature(view, sequence, false);
        return;
    }
    const int layers = view.shape.layers, sequences = view.shape.sequences;
    const double mean = static_cast<double>(view.buffers.limits[0]);
    const double least = static_cast<double>(view.buffers.limits[1]),
                 most = static_cast<double>(view.buffers.limits[2]);
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
    if (thread == 0) {
        const double way =
            smaller(larger((wanted - low_total) / larger(high_total - low_total, 1e-9), 0.0), 1.0);
        shared.fits = give_rows(view, sequence, low + way * (high - low), weights);
        view.accepted[sequence] = shared.fits;
    }
    __syncthreads();
    update_temperature(view, sequence, shared.fits);
}

}  // namespace starkv
