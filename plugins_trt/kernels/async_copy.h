// SPDX-License-Identifier: Apache-2.0
// Copies of 16 bytes from device memory to shared memory that go on while their thread does other work.
//
// A thread waits for all copies that it started; the others see the bytes after the next __syncthreads().
#pragma once

#include "platform.h"

#if STARKV_CPU
#include <vector>
#endif

namespace starkv {

constexpr int kCopyBytes = 16;

// copy_async(to, from, real) writes zeros where `real` is false, and then reads nothing.

#if STARKV_CPU

struct LateCopy {
    void* to;
    const void* from;
};

inline std::vector<LateCopy>& late_copies() {
    constexpr int kMostThreads = 1024;
    static thread_local std::vector<LateCopy> copies[kMostThreads];
    return copies[threadIdx.x];
}

// A GPU may have done a copy at once, or not before the wait. Here threads with even numbers do the former
// and the others the latter: both a missing wait and a start that comes too early change results.
inline void copy_async(void* to, const void* from, bool real) {
    static const unsigned char zeros[kCopyBytes] = {};
    if (!real) from = zeros;
    if (threadIdx.x % 2)
        late_copies().push_back({to, from});
    else
        std::memcpy(to, from, kCopyBytes);
}

inline void wait_for_copies() {
    for (const LateCopy& copy : late_copies()) std::memcpy(copy.to, copy.from, kCopyBytes);
    late_copies().clear();
}

#else

__device__ inline void copy_async(void* to, const void* from, bool real) {
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int bytes = real ? kCopyBytes : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif

}  // namespace starkv
