// SPDX-License-Identifier: Apache-2.0
// Chooses the next token of every sequence: one block looks at all logits of one.
//
// Nucleus sampling needs the tokens in order of their weights, but only to find where a sum is reached. A
// radix search does that without sorting: from the highest bits of the weights down, it adds up how much mass
// each value of the next bits has, and goes on with the one where the sum is reached.
#pragma once

#include "block.h"
#include "token_weight.h"

namespace starkv {

constexpr int kSamplingThreads = 1024;
constexpr int kSamplingWarps = kSamplingThreads / kWarp;
// Bits of one step of the search; two values for each thread. Four steps see all of a weight.
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
static_assert(kDigits == 2 * kSamplingThreads, "two values for each thread");

// The search's result: the smallest weight that is kept, and the mass of all larger ones.
struct Cut {
    Mass weight, above;
};

struct SamplingShared {
    BlockScratch<Mass> scratch;
    Mass mass[kDigits];
    Cut cut;
    // Of each warp's tokens.
    Mass mass_above[kSamplingWarps];
    int at_cut[kSamplingWarps];
};

struct TokenWeights {
    const float* logits;
    int count;
    float greatest, temperature;

    __device__ Mass operator[](int id) const {
        // Infinite ones have no distance from each other.
        return logits[id] == greatest ? token_weight(0.0F)
                                      : token_weight((greatest - logits[id]) / temperature);
    }
};

// The mass that a sum has to reach to hold `share` of all.
__device__ inline Mass mass_to_reach(float share, Mass all) {
    if (!(share > 0.0F)) return 1;
    const double wanted = ceil(static_cast<double>(share) * static_cast<double>(all));
    return wanted < static_cast<double>(all) ? static_cast<Mass>(wanted) : all;
}

// The mass that a running sum has to exceed, less than all.
__device__ inline Mass mass_to_exceed(float share, Mass all) {
    if (!(share > 0.0F)) return 0;
    const double wanted = floor(static_cast<double>(share) * static_cast<double>(all));
    return wanted < static_cast<double>(all - 1) ? static_cast<Mass>(wanted) : all - 1;
}

// The largest token's id; every thread gets it.
__device__ inline int greatest_token(const float* logits, int count, BlockScratch<Mass>& scratch) {
    Mass greatest = 0;
    for (int id = static_cast<int>(threadIdx.x); id < count; id += kSamplingThreads) {
        const Mass order = token_order(logits[id], id);
        greatest = order > greatest ? order : greatest;
    }
    return ordered_token(block_max(greatest, scratch));
}

// Adds up the mass of each value of the bits from `shift` on, of weights that share higher bits with `known`.
__device__ inline void add_up_digits(const TokenWeights& weights, Mass known, int shift,
                                     SamplingShared& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int digit = thread; digit < kDigits; digit += kSamplingThreads) shared.mass[digit] = 0;
    __syncthreads();
    // Most tokens share the lowest digit: a thread adds up runs of equal digits by itself.
    int run_digit = 0;
    Mass run = 0;
    for (int id = thread; id < weights.count; id += kSamplingThreads) {
        const Mass weight = weights[id];
        if (weight >> shift >> kDigitBits != known >> shift >> kDigitBits) continue;
        const int digit = static_cast<int>(weight >> shift) & (kDigits - 1);
        if (digit != run_digit) {
            if (run) atomic_add(&shared.mass[run_digit], run);
            run_digit = digit;
            run = 0;
        }
        run += weight;
    }
    if (run) atomic_add(&shared.mass[run_digit], run);
    __syncthreads();
}

// Finds the cut where the sum of weights, the largest first, reaches `share` of all; every thread gets the
// cut and the mass that has to be reached, which is 0 if no logit is a number.
__device__ inline Cut find_cut(const TokenWeights& weights, float share, SamplingShared& shared,
                               Mass& target) {
    Cut cut{0, 0};
    const int thread = static_cast<int>(threadIdx.x);
    for (int shift = 3 * kDigitBits; shift >= 0; shift -= kDigitBits) {
        add_up_digits(weights, cut.weight, shift, shared);
        // The first thread has the largest digits.
        const int upper = kDigits - 1 - 2 * thread, lower = upper - 1;
        const Mass upper_mass = shared.mass[upper], both = upper_mass + shared.mass[lower];
        const Running<Mass> sum = block_running_sum(both, shared.scratch);
        if (shift == 3 * kDigitBits) {
            if (sum.total == 0) {
                target = 0;
                return cut;
            }
            target = mass_to_reach(share, sum.total);
        }
        const Mass before = cut.above + sum.before;
        if (before < target && target <= before + both) {
            const bool is_upper = target <= before + upper_mass;
            shared.cut.weight = cut.weight | static_cast<Mass>(is_upper ? upper : lower) << shift;
            shared.cut.above = is_upper ? before : before + upper_mass;
        }
        __syncthreads();
        cut = shared.cut;
        __syncthreads();
    }
    return cut;
}

// Finds, in order of ids, the first kept token with which the sum exceeds `share` of what is kept. Of tokens
// at the cut, the first `kept_at_cut` are kept. The warp that finds it writes it.
__device__ inline void choose_token(const TokenWeights& weights, Cut cut, int kept_at_cut, float share,
                                    SamplingShared& shared, int32_t* chosen) {
    const int own_tokens = ceil_div(ceil_div(weights.count, kSamplingWarps), kWarp) * kWarp;
    const int first = warp_index() * own_tokens, end = min(first + own_tokens, weights.count);
    Mass above = 0;
    int at_cut = 0;
    for (int id = first + lane_index(); id < end; id += kWarp) {
        const Mass weight = weights[id];
        above += weight > cut.weight ? weight : 0;
        at_cut += weight == cut.weight;
    }
    above = warp_reduce(above, [](Mass a, Mass b) { return a + b; });
    at_cut = warp_reduce(at_cut, [](int a, int b) { return a + b; });
    if (lane_index() == 0) {
        shared.mass_above[warp_index()] = above;
        shared.at_cut[warp_index()] = at_cut;
    }
    __syncthreads();
    Mass sum = 0;
    int seen_at_cut = 0;
    for (int warp = 0; warp < warp_index(); ++warp) {
        sum += shared.mass_above[warp];
        seen_at_cut += shared.at_cut[warp];
    }
    sum += cut.weight * static_cast<Mass>(min(seen_at_cut, kept_at_cut));

    const Mass kept = cut.above + cut.weight * static_cast<Mass>(kept_at_cut);
    const Mass passed = mass_to_exceed(share, kept);
    for (int start = first; start < end && sum <= passed; start += kWarp) {
        const int id = start + lane_index();
        const Mass weight = id < end ? weights[id] : 0;
        const bool is_at_cut = id < end && weight == cut.weight;
        const unsigned ties = ballot(is_at_cut), lower_lanes = (1U << lane_index()) - 1;
        const bool stays =
            is_at_cut ? seen_at_cut + count_bits(ties & lower_lanes) < kept_at_cut : weight > cut.weight;
        Mass running = stays ? weight : 0;
        for (int lanes = 1; lanes < kWarp; lanes *= 2) {
            const Mass other = shfl_up(running, lanes);
            if (lane_index() >= lanes) running += other;
        }
        const unsigned reached = ballot(sum + running > passed);
        if (reached && lane_index() == lowest_bit(reached)) *chosen = id;
        sum += shfl(running, kWarp - 1);
        seen_at_cut += count_bits(ties);
    }
}

// Grid: sequences.
__global__ void __launch_bounds__(kSamplingThreads)
    argmax_tokens(const float* logits, int32_t* ids, int vocabulary) {
    auto& scratch = shared_memory<BlockScratch<Mass>>();
    const int sequence = static_cast<int>(blockIdx.x);
    const int id = greatest_token(logits + static_cast<size_t>(sequence) * vocabulary, vocabulary, scratch);
    if (threadIdx.x == 0) ids[sequence] = id;
}

// Grid: sequences.
__global__ void __launch_bounds__(kSamplingThreads)
    sample_tokens(const float* logits, const float* temperature, const float* top_p, const float* uniform,
                  int32_t* ids, int vocabulary) {
    auto& shared = shared_memory<SamplingShared>();
    const int sequence = static_cast<int>(blockIdx.x);
    const float* own = logits + static_cast<size_t>(sequence) * vocabulary;
    const int greatest = greatest_token(own, vocabulary, shared.scratch);
    const TokenWeights weights{own, vocabulary, own[greatest], temperature[sequence]};
    Cut cut{0, 0};
    Mass target = 0;
    if (weights.temperature > 0.0F) cut = find_cut(weights, top_p[sequence], shared, target);
    if (target == 0) {
        if (threadIdx.x == 0) ids[sequence] = greatest;
        return;
    }
    const auto kept_at_cut = static_cast<int>((target - cut.above + cut.weight - 1) / cut.weight);
    choose_token(weights, cut, kept_at_cut, uniform[sequence], shared, ids + sequence);
}

}  // namespace starkv
