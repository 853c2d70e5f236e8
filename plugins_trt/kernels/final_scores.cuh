// SPDX-License-Identifier: Apache-2.0
// The score of every row, from those of its KV heads: weighted by information, discounted by age, sharpened
// by entropy (docs/spec/star-kv.md §1, steps 9 to 11).
#pragma once

#include "group_scores.cuh"

namespace starkv {

// A score's place among those that compete: protected rows before all, what is no number behind all.
__host__ __device__ inline float priority_of(float score, bool is_protected) {
    constexpr float kHighest = 3.4028234663852886e+38F;
    if (is_protected) return kHighest;
    if (!(score == score)) return -INFINITY;
    return score < kHighest / 2 ? score : kHighest / 2;
}

struct FinalShared {
    float weights[kMostKvHeads];
    float stability[kMostKvHeads];
};

// Softmax of the KV heads' information, on request stretched to 0 ... 1 first; by one thread.
__device__ inline void weigh_heads(const Plan& plan, const float* information, int heads, float* weights) {
    if (!(plan.mi_usable > 0.0F)) {
        for (int head = 0; head < heads; ++head) weights[head] = 1.0F / static_cast<float>(heads);
        return;
    }
    float least = information[0], most = information[0];
    for (int head = 1; head < heads; ++head) {
        least = fminf(least, information[head]);
        most = fmaxf(most, information[head]);
    }
    const bool stretch = plan.mi_stretch > 0.0F;
    const float width = most - least;
    float greatest = -INFINITY, total = 0.0F;
    for (int head = 0; head < heads; ++head) {
        const float stretched = width < 1e-12F ? 0.5F : (information[head] - least) / fmaxf(width, 1e-12F);
        weights[head] = (stretch ? stretched : information[head]) / plan.mi_tau;
        greatest = fmaxf(greatest, weights[head]);
    }
    for (int head = 0; head < heads; ++head) {
        weights[head] = expf(weights[head] - greatest);
        total += weights[head];
    }
    for (int head = 0; head < heads; ++head) weights[head] /= total;
}

// A block for kRowsPerBlock rows of a sequence.
__global__ void __launch_bounds__(kRowThreads) final_scores(CompressView view) {
    const Sequence sequence(view, static_cast<int>(blockIdx.y));
    auto& shared = shared_memory<FinalShared>();
    const Plan& plan = view.plan();
    const int capacity = view.shape.capacity, heads = view.shape.kv_heads;
    const size_t head_index = static_cast<size_t>(sequence.index) * heads;
    const int first = static_cast<int>(blockIdx.x) * kRowsPerBlock,
              end = min(first + kRowsPerBlock, capacity);
    if (threadIdx.x == 0 && sequence.valid)
        weigh_heads(plan, view.buffers.new_mi_ema + head_index, heads, shared.weights);
    for (int head = static_cast<int>(threadIdx.x); head < heads; head += kRowThreads)
        shared.stability[head] = view.stability[head_index + head];
    __syncthreads();
    const size_t rows = static_cast<size_t>(sequence.index) * capacity;
    float* stages = view.buffers.stages ? view.buffers.stages + rows * 4 : nullptr;
    const bool discounts = plan.temporal_update > 0.0F && plan.temporal_apply > 0.0F;
    for (int row = first + static_cast<int>(threadIdx.x); row < end; row += kRowThreads) {
        if (!sequence.valid || row >= sequence.past) {
            if (view.buffers.scores) view.buffers.scores[rows + row] = 0.0F;
            for (int stage = 0; stages && stage < 4; ++stage) stages[stage * capacity + row] = 0.0F;
            continue;
        }
        int leading = 0;
        float leading_score = view.group_rows(sequence.index, 0)[row];
        for (int head = 1; head < heads; ++head) {
            const float score = view.group_rows(sequence.index, head)[row];
            if (score > leading_score) {
                leading = head;
                leading_score = score;
            }
        }
        const float relative = shared.weights[leading] * static_cast<float>(heads);
        const float weighted = view.base[rows + row] * ((1.0F - plan.mi_weight) + plan.mi_weight * relative);
        float discounted = weighted;
        if (discounts) {
            const int row_frame = view.buffers.row_meta[(rows + row) * kMetaColumns];
            const float distance = row_frame >= 0 ? static_cast<float>(view.frame().index - row_frame) : 0.0F;
            const float strength = plan.temporal_eps + (1.0F - plan.temporal_eps) * shared.stability[leading];
            const float power = expf(-plan.temporal_delta * distance * strength);
            discounted *= plan.temporal_floor + (1.0F - plan.temporal_floor) * power;
        }
        float score = discounted;
        if (plan.entropy_power > 0.0F && score == score)
            score = powf(fmaxf(score, 0.0F), 1.0F / view.buffers.new_temperature[sequence.index]);
        const bool is_protected = view.buffers.row_meta[(rows + row) * kMetaColumns + kProtectedColumn] > 0;
        view.keys[rows + row] = ~ordered_key(priority_of(score, is_protected));
        if (view.buffers.scores) view.buffers.scores[rows + row] = score;
        if (stages) {
            stages[2 * capacity + row] = weighted;
            stages[3 * capacity + row] = discounted;
        }
    }
}

}  // namespace starkv
