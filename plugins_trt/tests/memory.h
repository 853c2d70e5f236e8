// SPDX-License-Identifier: Apache-2.0
// Where a plugin's tensors lie: in host memory for the CPU build, in device memory for the real one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace starkv::tests {

class Memory {
public:
    virtual ~Memory() = default;
    // Aligned to 256 bytes, as TensorRT's; lives as long as this object.
    virtual void* allocate(std::size_t bytes) = 0;
    virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
    // Waits for the stream first.
    virtual void download(void* to, const void* from, std::size_t bytes) = 0;
    virtual cudaStream_t stream() const = 0;
};

class HostMemory final : public Memory {
public:
    ~HostMemory() override {
        for (void* block : blocks_) std::free(block);
    }
    void* allocate(std::size_t bytes) override {
        constexpr std::size_t kAlignment = 256;
        void* block = std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment);
        if (block == nullptr) throw std::bad_alloc();
        blocks_.push_back(block);
        return block;
    }
    void upload(void* to, const void* from, std::size_t bytes) override { copy(to, from, bytes); }
    void download(void* to, const void* from, std::size_t bytes) override { copy(to, from, bytes); }
    cudaStream_t stream() const override { return nullptr; }

private:
    static void copy(void* to, const void* from, std::size_t bytes) {
        // An empty tensor's data may be null, which memcpy does not take.
        if (bytes > 0) std::memcpy(to, from, bytes);
    }

    std::vector<void*> blocks_;
};

}  // namespace starkv::tests
