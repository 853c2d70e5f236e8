// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, so that the sources that GPUs run are tested on machines without one.
//
// A block's threads are fibers of one OS thread: each runs until it needs another one (a barrier, a warp
// function), then the next goes on. Blocks run one after the other. Made to find mistakes:
//   - shared memory starts as garbage (0xCD), as on a GPU;
//   - STARKV_CPU_SCHEDULE=forward|reverse|shuffle changes the order in which threads run: a missing barrier
//     shows as a result that changes;
//   - a barrier or warp function that not all threads reach aborts with a message instead of hanging;
//   - it builds with address and undefined-behaviour sanitizers.
// It says nothing of what only hardware has: alignment of vector loads aside, no memory model, no limits of
// registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifndef __align__
#define __align__(n) alignas(n)
#endif

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace starkv::cpu_device {

struct Position {
    dim3 thread, block, block_size, grid_size;
};
// Of the thread that runs now.
extern thread_local Position position;

// Runs all blocks of a grid.
void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);

void* shared_memory();
void block_barrier();
// Ends the program with a message that names the block.
[[noreturn]] void die(const char* message);

// Every thread of the warp gives `bytes` bytes; when all have, `combine(all, lane)` has seen the others'.
// `exchange` returns where the warp's 32 values lie, kMostBytes apart, until the caller's next exchange.
constexpr size_t kMostBytes = 64;
const unsigned char* exchange(const void* value, size_t bytes);

template <class T>
T value_of(const unsigned char* values, int lane) {
    T value;
    std::memcpy(&value, values + kMostBytes * static_cast<size_t>(lane), sizeof(T));
    return value;
}

template <class T>
T shfl(T value, int lane) {
    return value_of<T>(exchange(&value, sizeof(T)), lane & 31);
}
template <class T>
T shfl_xor(T value, int lanes) {
    const int lane = static_cast<int>(position.thread.x) & 31;
    return value_of<T>(exchange(&value, sizeof(T)), lane ^ lanes);
}
template <class T>
T shfl_up(T value, int lanes) {
    const int lane = static_cast<int>(position.thread.x) & 31;
    return value_of<T>(exchange(&value, sizeof(T)), lane < lanes ? lane : lane - lanes);
}
template <class T>
T shfl_down(T value, int lanes) {
    const int lane = static_cast<int>(position.thread.x) & 31;
    return value_of<T>(exchange(&value, sizeof(T)), lane + lanes > 31 ? lane : lane + lanes);
}
inline unsigned ballot(bool value) {
    const unsigned char* values = exchange(&value, sizeof(value));
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(value_of<bool>(values, lane)) << lane;
    return bits;
}

inline unsigned match_any(unsigned value) {
    const unsigned char* values = exchange(&value, sizeof(value));
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane)
        bits |= static_cast<unsigned>(value_of<unsigned>(values, lane) == value) << lane;
    return bits;
}

// Threads take turns at barriers only, so plain arithmetic is atomic.
template <class T>
T atomic_add(T* address, T value) {
    const T before = *address;
    *address = static_cast<T>(before + value);
    return before;
}

}  // namespace starkv::cpu_device

#define threadIdx (::starkv::cpu_device::position.thread)
#define blockIdx (::starkv::cpu_device::position.block)
#define blockDim (::starkv::cpu_device::position.block_size)
#define gridDim (::starkv::cpu_device::position.grid_size)
#define __syncthreads() ::starkv::cpu_device::block_barrier()
#define __syncwarp() ((void)::starkv::cpu_device::ballot(true))
