// SPDX-License-Identifier: Apache-2.0
// What a kernel may use, on a GPU (nvcc) and on the CPU (any C++17 compiler, for tests).
//
// Kernels keep to it: shared memory only through shared_memory<T>(), launches only through launch(), warp
// functions only those below, always by all 32 threads of a warp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#if STARKV_CPU
#include "cpu_device.h"
#else
#include <cuda_runtime.h>
#endif

namespace starkv {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffU;

#if STARKV_CPU

using Stream = void*;
using cpu_device::atomic_add;
using cpu_device::ballot;
using cpu_device::match_any;
using cpu_device::shfl;
using cpu_device::shfl_down;
using cpu_device::shfl_up;
using cpu_device::shfl_xor;

template <class T>
T& shared_memory() {
    return *static_cast<T*>(cpu_device::shared_memory());
}

template <class... Parameters, class... Arguments>
bool launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Stream,
            Arguments... arguments) {
    cpu_device::run(grid, threads, shared_bytes, [=] { kernel(arguments...); });
    return true;
}

inline bool copy_on_device(void* to, const void* from, size_t bytes, Stream) {
    std::memcpy(to, from, bytes);
    return true;
}
inline bool clear_on_device(void* memory, size_t bytes, Stream) {
    std::memset(memory, 0, bytes);
    return true;
}

// Blocks run one after the other here: what an earlier one was to set is set, or never will be.
inline void wait_until_set(const int* flag) {
    if (!*flag) cpu_device::die("a block waits for one that comes after it");
}
inline void device_fence() {}
inline float2 load_published(const float2* address) { return *address; }

#else

using Stream = cudaStream_t;

__device__ inline int atomic_add(int* address, int value) { return atomicAdd(address, value); }
__device__ inline unsigned long long atomic_add(unsigned long long* address, unsigned long long value) {
    return atomicAdd(address, value);
}
template <class T>
__device__ T shfl(T value, int lane) {
    return __shfl_sync(kWholeWarp, value, lane);
}
template <class T>
__device__ T shfl_up(T value, int lanes) {
    return __shfl_up_sync(kWholeWarp, value, lanes);
}
template <class T>
__device__ T shfl_down(T value, int lanes) {
    return __shfl_down_sync(kWholeWarp, value, lanes);
}
template <class T>
__device__ T shfl_xor(T value, int lanes) {
    return __shfl_xor_sync(kWholeWarp, value, lanes);
}
__device__ inline unsigned ballot(bool value) { return __ballot_sync(kWholeWarp, value); }
// Lanes that hold the same value.
__device__ inline unsigned match_any(unsigned value) { return __match_any_sync(kWholeWarp, value); }

template <class T>
__device__ T& shared_memory() {
    extern __shared__ __align__(16) unsigned char starkv_shared_memory[];
    return *reinterpret_cast<T*>(starkv_shared_memory);
}

// Launches a kernel; whether CUDA took it. Errors of earlier work are left for whoever made them.
template <class... Parameters, class... Arguments>
bool launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Stream stream,
            Arguments... arguments) {
    constexpr size_t kSharedWithoutAsking = 48 * 1024;
    if (shared_bytes > kSharedWithoutAsking &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    // clang-format off
    kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
    // clang-format on
    return cudaGetLastError() == cudaSuccess;
}

inline bool copy_on_device(void* to, const void* from, size_t bytes, Stream stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream) == cudaSuccess;
}
inline bool clear_on_device(void* memory, size_t bytes, Stream stream) {
    return cudaMemsetAsync(memory, 0, bytes, stream) == cudaSuccess;
}

// Blocks of one launch that work on each other's results: what a block wrote before a fence and then a flag,
// a block that finds the flag set sees behind a fence of its own, if it reads past the L1 cache.
__device__ inline void device_fence() { __threadfence(); }
__device__ inline float2 load_published(const float2* address) { return __ldcg(address); }
__device__ inline void wait_until_set(const int* flag) {
    while (!*static_cast<const volatile int*>(flag)) __nanosleep(100);
    __threadfence();
}

#endif

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

__device__ inline int count_bits(unsigned bits) {
#if STARKV_CPU
    return __builtin_popcount(bits);
#else
    return __popc(bits);
#endif
}
// Index of the lowest bit that is set; -1 if none is.
__device__ inline int lowest_bit(unsigned bits) {
#if STARKV_CPU
    return __builtin_ffs(static_cast<int>(bits)) - 1;
#else
    return __ffs(static_cast<int>(bits)) - 1;
#endif
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace starkv
