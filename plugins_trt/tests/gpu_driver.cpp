// SPDX-License-Identifier: Apache-2.0
// Runs the plugins on a GPU, without a builder or an engine. Exits with 77 ("skipped") where there is no GPU.

#include <cuda_runtime_api.h>

#include <cstdio>
#include <exception>

#include "check.h"
#include "enqueue_checks.h"

namespace starkv::tests {

namespace {

constexpr int kSkipped = 77;

void require_success(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

class DeviceMemory final : public Memory {
public:
    DeviceMemory() { require_success(cudaStreamCreate(&stream_), "cudaStreamCreate"); }
    ~DeviceMemory() override {
        for (void* block : blocks_) cudaFree(block);
        cudaStreamDestroy(stream_);
    }
    void* allocate(std::size_t bytes) override {
        void* block = nullptr;
        require_success(cudaMalloc(&block, bytes + 1), "cudaMalloc");
        blocks_.push_back(block);
        return block;
    }
    void upload(void* to, const void* from, std::size_t bytes) override {
        require_success(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
    }
    void download(void* to, const void* from, std::size_t bytes) override {
        require_success(cudaStreamSynchronize(stream_), "the kernels");
        require_success(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
    }
    cudaStream_t stream() const override { return stream_; }

private:
    cudaStream_t stream_ = nullptr;
    std::vector<void*> blocks_;
};

}  // namespace

}  // namespace starkv::tests

int main(int argument_count, char** arguments) {
    using namespace starkv::tests;
    if (argument_count != 2) {
        std::fputs("usage: gpu_driver PLUGIN_LIBRARY\n", stderr);
        return 2;
    }
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::puts("gpu_driver: no GPU, skipped");
        return kSkipped;
    }
    try {
        PluginLibrary library(arguments[1]);
        DeviceMemory memory;
        check_attention_runs(library, memory);
        check_full_attention_runs(library, memory);
        check_quantized_attention_runs(library, memory);
        check_packable_attention_runs(library, memory);
        check_compress_runs(library, memory);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "gpu_driver: %s\n", error.what());
        return 1;
    }
    std::printf("gpu_driver: %d failed checks\n", failure_count());
    return failure_count() == 0 ? 0 : 1;
}
