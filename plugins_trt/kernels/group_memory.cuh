// SPDX-License-Identifier: Apache-2.0
// What STaR-KV remembers of each KV head: how informative its scores are of places on the screen, and what it
// attended to (docs/spec/star-kv.md §4 and §6).
#pragma once

#include "compress_view.h"
#include "radix.h"

namespace starkv {

constexpr int kMemoryThreads = 512;
constexpr int kPlaceBins = 12;
constexpr int kPlaces = kPlaceBins * kPlaceBins;
constexpr int kValueBins = 16;
constexpr int kBounds = kValueBins - 1;

__host__ __device__ inline int place_bin(int position, int positions) {
    const int64_t bin =
        static_cast<int64_t>(kPlaceBins) * (2 * position + 1) / (2 * static_cast<int64_t>(positions));
    return bin < kPlaceBins - 1 ? static_cast<int>(bin) : kPlaceBins - 1;
}
// Cell of the 12 x 12 screen that a token's centre falls into.
__host__ __device__ inline int place_of(int token, int grid_rows, int grid_columns) {
    return place_bin(token / grid_columns, grid_rows) * kPlaceBins +
           place_bin(token % grid_columns, grid_columns);
}
// First rank of a value bin, of 16 equally full ones.
__host__ __device__ inline int first_rank(int bin, int count) {
    return static_cast<int>((static_cast<int64_t>(bin) * count + kValueBins - 1) / kValueBins);
}
// One cell's share of the mutual information, nats: `together` of `count` elements, `values` and `places` in
// all.
__host__ __device__ inline double information_term(int together, int values, int places, int count) {
    if (together == 0) return 0.0;
    const double n = count, joint = together / n, independent = (values / n) * (places / n);
    return joint * (log(joint + 1e-12) - log(independent + 1e-12));
}

struct MemoryShared {
    RadixScratch<kBounds> radix;
    int joint[kValueBins][kPlaces];
    int of_value[kValueBins];
    int of_place[kPlaces];
    BlockScratch<double> doubles;
    BlockScratch<float> floats;
};

// Plug-in mutual information between the place of a token and the rank of its score.
__device__ inline double spatial_information(const float* scores, int count, const FrameNumbers& frame,
                                             MemoryShared& shared) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const auto key_of = [&](int i) { return sort_key(ordered_key(fmaxf(scores[i], 0.0F)), i); };
    int ranks[kBounds];
    for (int bin = 0; bin < kBounds; ++bin) ranks[bin] = first_rank(bin + 1, count);
    radix_bounds(ranks, count, key_of, shared.radix);
    for (int i = thread; i < kValueBins * kPlaces; i += threads) shared.joint[i / kPlaces][i % kPlaces] = 0;
    __syncthreads();
    for (int i = thread; i < count; i += threads) {
        const SortKey key = key_of(i);
        int bin = 0;
        for (int bound = 0; bound < kBounds; ++bound) bin += key >= shared.radix.bits[bound];
        atomic_add(&shared.joint[bin][place_of(i, frame.grid_rows, frame.grid_columns)], 1);
    }
    __syncthreads();
    for (int i = thread; i < kValueBins + kPlaces; i += threads) {
        int sum = 0;
        if (i < kValueBins) {
            for (int place = 0; place < kPlaces; ++place) sum += shared.joint[i][place];
            shared.of_value[i] = sum;
        } else {
            for (int bin = 0; bin < kValueBins; ++bin) sum += shared.joint[bin][i - kValueBins];
            shared.of_place[i - kValueBins] = sum;
        }
    }
    __syncthreads();
    double information = 0.0;
    for (int i = thread; i < kValueBins * kPlaces; i += threads) {
        const int bin = i / kPlaces, place = i % kPlaces;
        information +=
            information_term(shared.joint[bin][place], shared.of_value[bin], shared.of_place[place], count);
    }
    information = block_sum(information, shared.doubles);
    return information > 0.0 ? information : 0.0;
}

// Compares what a head attends to with what it attended to, and remembers both: clipped cosine.
__device__ inline float compare_pattern(const CompressView& view, const float* scores, int count, float total,
                                        const float* before, float* after, BlockScratch<float>& scratch) {
    const Plan& plan = view.plan();
    const float divisor = fmaxf(total, 1e-8F);
    float dot = 0.0F, own = 0.0F, other = 0.0F;
    for (int i = static_cast<int>(threadIdx.x); i < view.shape.pattern_capacity;
         i += static_cast<int>(blockDim.x)) {
        const float earlier = before[i];
        if (i >= count) {
            after[i] = earlier;
            continue;
        }
        const float pattern = fmaxf(scores[i], 0.0F) / divisor;
        // Without an average of this size there is nothing to go on from, whatever the memory holds.
        const float updated = plan.pattern_usable > 0.0F
                                  ? plan.temporal_rho * earlier + (1.0F - plan.temporal_rho) * pattern
                                  : pattern;
        const float reference = plan.temporal_earlier > 0.0F ? earlier : updated;
        after[i] = updated;
        dot += pattern * reference;
        own += pattern * pattern;
        other += reference * reference;
    }
    dot = block_sum(dot, scratch);
    own = block_sum(own, scratch);
    other = block_sum(other, scratch);
    if (plan.temporal_earlier > 0.0F && !(plan.pattern_usable > 0.0F)) return 0.0F;
    const float cosine = dot / (fmaxf(sqrtf(own), 1e-8F) * fmaxf(sqrtf(other), 1e-8F));
    return fminf(fmaxf(cosine, 0.0F), 1.0F);
}

// A block for each KV head of each sequence.
__global__ void __launch_bounds__(kMemoryThreads) update_group_memory(CompressView view) {
    const int group = static_cast<int>(blockIdx.x);
    const Sequence sequence(view, static_cast<int>(blockIdx.y));
    auto& shared = shared_memory<MemoryShared>();
    const Plan& plan = view.plan();
    const size_t head = static_cast<size_t>(sequence.index) * view.shape.kv_heads + group;
    const float* before = view.buffers.pattern_ema + head * view.shape.pattern_capacity;
    float* after = view.buffers.new_pattern_ema + head * view.shape.pattern_capacity;
    const float* scores = view.group_rows(sequence.index, group) + sequence.start;
    const bool compares = sequence.valid && plan.temporal_update > 0.0F;
    const bool informs = sequence.valid && plan.mi_enabled > 0.0F;

    float total = 0.0F;
    if (compares || informs) {
        float sum = 0.0F;
        for (int i = static_cast<int>(threadIdx.x); i < sequence.cells; i += kMemoryThreads)
            sum += fmaxf(scores[i], 0.0F);
        total = block_sum(sum, shared.floats);
    }
    float average = view.buffers.mi_ema[head];
    if (informs) {
        double information = 0.0;
        // Scores that are all 0 rank by row alone, which says nothing; nor does a single one.
        if (total > 1e-12F && sequence.cells > 1)
            information = spatial_information(scores, sequence.cells, view.frame(), shared);
        const float real = fmaxf(static_cast<float>(information) - plan.mi_chance, 0.0F) * plan.mi_scale;
        average = plan.mi_decay > 0.0F ? plan.mi_decay * average + (1.0F - plan.mi_decay) * real : real;
    }
    float stability = 0.0F;
    if (compares)
        stability = compare_pattern(view, scores, sequence.cells, total, before, after, shared.floats);
    else
        for (int i = static_cast<int>(threadIdx.x); i < view.shape.pattern_capacity; i += kMemoryThreads)
            after[i] = before[i];
    if (threadIdx.x == 0) {
        view.buffers.new_mi_ema[head] = average;
        view.stability[head] = stability;
    }
}

}  // namespace starkv
