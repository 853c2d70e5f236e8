// SPDX-License-Identifier: Apache-2.0
// Sums, maxima and running counts over the threads of a block. Sums add in a fixed order, so results repeat.
#pragma once

#include <type_traits>

#include "platform.h"

namespace starkv {

constexpr int kMostWarps = 32;

template <class T>
struct BlockScratch {
    T of_warp[kMostWarps];
};

template <class T, class Combine>
__device__ T warp_reduce(T value, Combine combine) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = combine(value, shfl_xor(value, lanes));
    return value;
}

// Every thread gets the result. All threads of the block take part.
template <class T, class Combine>
__device__ T block_reduce(T value, BlockScratch<T>& scratch, Combine combine) {
    value = warp_reduce(value, combine);
    if (lane_index() == 0) scratch.of_warp[warp_index()] = value;
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    T result = scratch.of_warp[0];
    for (int warp = 1; warp < warps; ++warp) result = combine(result, scratch.of_warp[warp]);
    __syncthreads();
    return result;
}

template <class T>
__device__ T block_sum(T value, BlockScratch<T>& scratch) {
    return block_reduce(value, scratch, [](T a, T b) { return a + b; });
}

template <class T>
__device__ T block_max(T value, BlockScratch<T>& scratch) {
    return block_reduce(value, scratch, [](T a, T b) { return a > b ? a : b; });
}

template <class T>
struct Running {
    T before;
    T total;
};

// Sum of the values of the threads before this one, and of all. The scratch alone says what type they have.
template <class T>
__device__ Running<T> block_running_sum(std::common_type_t<T> value, BlockScratch<T>& scratch) {
    T running = value;
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
        const T other = shfl_up(running, lanes);
        if (lane_index() >= lanes) running += other;
    }
    if (lane_index() == kWarp - 1) scratch.of_warp[warp_index()] = running;
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    T before = running - value, total = 0;
    for (int warp = 0; warp < warps; ++warp) {
        if (warp < warp_index()) before += scratch.of_warp[warp];
        total += scratch.of_warp[warp];
    }
    __syncthreads();
    return {before, total};
}

}  // namespace starkv
