// SPDX-License-Identifier: Apache-2.0

#include "device_copy.h"

namespace starkv::trt {

bool copy_on_stream(void* to, const void* from, std::size_t bytes, cudaStream_t stream) noexcept {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream) == cudaSuccess;
}

}  // namespace starkv::trt
