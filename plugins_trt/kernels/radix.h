// SPDX-License-Identifier: Apache-2.0
// Exact order statistics of one block without sorting: 8 bits of the keys at a time.
#pragma once

#include "block.h"

namespace starkv {

// What elements are ordered by, ascending: 32 bits of a value's order, then 24 bits of its row. No two are
// equal, so every rank belongs to one element.
using SortKey = unsigned long long;
constexpr int kRowBits = 24;
constexpr SortKey kAboveAll = ~SortKey{0};

__host__ __device__ inline SortKey sort_key(uint32_t value, int row) {
    return static_cast<SortKey>(value) << kRowBits | static_cast<unsigned>(row);
}

constexpr int kDigits = 256;
constexpr int kDigitBits = 8;
constexpr int kFirstShift = 32 + kRowBits - kDigitBits;

template <int kRanks>
struct RadixScratch {
    int counts[kRanks][kDigits];
    // Of each rank: the bits found so far (the others 0), elements below it that share them, whether that is
    // all, and the first rank that shares the bits.
    SortKey bits[kRanks];
    int left[kRanks];
    int owner[kRanks];
    bool open;
};

// Finds for each rank (ascending; 0 is the smallest key) a bound such that exactly `rank` keys are below it.
// `bounds` becomes scratch.bits. Ranks from `count` on get kAboveAll.
//
// All threads of the block call it; key_of(i) gives the key of element i < count, as often as asked.
template <int kRanks, class KeyOf>
__device__ void radix_bounds(const int (&ranks)[kRanks], int count, KeyOf key_of,
                             RadixScratch<kRanks>& scratch) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (thread < kRanks) {
        scratch.bits[thread] = 0;
        scratch.left[thread] = ranks[thread] < count ? ranks[thread] : 0;
    }
    bool open = true;
    for (int shift = kFirstShift; shift >= 0 && open; shift -= kDigitBits) {
        __syncthreads();
        if (thread == 0) {
            scratch.open = false;
            for (int rank = 0; rank < kRanks; ++rank) {
                const bool shared = rank > 0 && scratch.bits[rank] == scratch.bits[rank - 1];
                scratch.owner[rank] = shared ? scratch.owner[rank - 1] : rank;
            }
        }
        for (int i = thread; i < kRanks * kDigits; i += threads) scratch.counts[i / kDigits][i % kDigits] = 0;
        __syncthreads();
        const int known = shift + kDigitBits;
        // Whole warps go round together. Scores crowd into few digits: a warp adds equal ones up first.
        for (int start = thread - lane_index(); start < count; start += threads) {
            const int i = start + lane_index();
            const SortKey key = i < count ? key_of(i) : 0;
            for (int rank = 0; rank < kRanks; ++rank) {
                if (scratch.owner[rank] != rank) continue;
                const bool counts = i < count && key >> known == scratch.bits[rank] >> known;
                // Later digits concern few keys.
                if (!ballot(counts)) continue;
                const unsigned digit = counts ? static_cast<unsigned>(key >> shift) & (kDigits - 1) : kDigits;
                const unsigned same = match_any(digit);
                if (counts && lane_index() == lowest_bit(same))
                    atomic_add(&scratch.counts[rank][digit], count_bits(same));
            }
        }
        __syncthreads();
        if (thread < kRanks) {
            const int* counts = scratch.counts[scratch.owner[thread]];
            int digit = 0, left = scratch.left[thread];
            while (digit < kDigits - 1 && left >= counts[digit]) left -= counts[digit++];
            scratch.left[thread] = left;
            scratch.bits[thread] |= static_cast<SortKey>(digit) << shift;
            // Nothing with these bits is below the rank: lower bits need not be known.
            if (left > 0) scratch.open = true;
        }
        __syncthreads();
        open = scratch.open;
    }
    if (thread < kRanks && ranks[thread] >= count) scratch.bits[thread] = kAboveAll;
    __syncthreads();
}

}  // namespace starkv
