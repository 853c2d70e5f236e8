// SPDX-License-Identifier: Apache-2.0
// The only thing that plugins do to memory themselves. One of two sources is linked: for the GPU
// (device_copy_cuda.cpp), or for the CPU build that tests run (device_copy_cpu.cpp).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace starkv::trt {

// Enqueues a copy between two buffers of the device; whether it was accepted.
bool copy_on_stream(void* to, const void* from, std::size_t bytes, cudaStream_t stream) noexcept;

}  // namespace starkv::trt
