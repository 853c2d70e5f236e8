// SPDX-License-Identifier: Apache-2.0
// What all of starkv's plugins share: TensorRT's V3 interfaces, answered from the operator's signature. A
// plugin adds its attributes and the call into the kernels' C ABI.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>

#include "signature.h"

namespace starkv::trt {

constexpr const char* kPluginNamespace = "ai.starkv";
constexpr const char* kPluginVersion = "1";

// Holds no device memory and no state that a call changes: clones are independent, and one plugin may serve
// several execution contexts.
class OperatorPlugin : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuildV2,
                       public nvinfer1::IPluginV3OneRuntime {
public:
    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;

    // Core
    const char* getPluginName() const noexcept final { return signature_.name; }
    const char* getPluginVersion() const noexcept final { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept final { return kPluginNamespace; }

    // Build
    std::int32_t getNbOutputs() const noexcept final { return signature_.output_count; }
    std::int32_t getOutputDataTypes(nvinfer1::DataType* output_types, std::int32_t output_count,
                                    const nvinfer1::DataType* input_types,
                                    std::int32_t input_count) const noexcept final;
    std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                                 const nvinfer1::DimsExprs* shape_inputs, std::int32_t shape_input_count,
                                 nvinfer1::DimsExprs* outputs, std::int32_t output_count,
                                 nvinfer1::IExprBuilder& builder) noexcept final;
    bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   std::int32_t input_count, std::int32_t output_count) noexcept final;
    std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                 const nvinfer1::DynamicPluginTensorDesc* outputs,
                                 std::int32_t output_count) noexcept final;
    std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                 const nvinfer1::DynamicPluginTensorDesc* outputs,
                                 std::int32_t output_count) const noexcept final;
    std::int32_t getAliasedInput(std::int32_t output) noexcept final;
    // "cuda", or "cpu" for the build that tests run: where tensors must lie.
    const char* getMetadataString() noexcept final;

    // Runtime
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;
    std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::PluginTensorDesc* outputs,
                               std::int32_t output_count) noexcept final;
    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs,
                         const nvinfer1::PluginTensorDesc* output_descs, const void* const* inputs,
                         void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;

    // One call of the operator, whose tensors fit each other.
    struct Call {
        Sizes sizes;
        nvinfer1::DataType cache_type;
        const nvinfer1::PluginTensorDesc* output_descs;
        const void* const* inputs;
        void* const* outputs;
        void* workspace;
        std::size_t workspace_bytes;
        cudaStream_t stream;
    };

protected:
    explicit OperatorPlugin(const Signature& signature) noexcept : signature_(signature) {}

    // Reports and returns false if the attributes do not allow these sizes.
    virtual bool fits_attributes(const Sizes& /*sizes*/) const noexcept { return true; }
    // Reports and returns false if a call can't have these sizes. A profile's largest sizes can be such where
    // no call has them all at once.
    virtual bool fits_call(const Sizes& /*sizes*/) const noexcept { return true; }
    // Bytes of workspace, as a starkv_status.
    virtual int workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                                std::size_t* bytes) const noexcept = 0;
    // The most that any sizes up to these need, as a starkv_status: TensorRT reserves it for a whole profile.
    virtual int most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
                                     std::size_t* bytes) const noexcept {
        return workspace_bytes(largest, cache_type, bytes);
    }
    // Launches the kernels; returns a starkv_status.
    virtual int launch(const Call& call) const noexcept = 0;

private:
    // Sizes and workspace of a call. Reports and returns false if it cannot be run.
    bool prepare(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                 Sizes& sizes, std::size_t& bytes) const noexcept;

    const Signature& signature_;
};

// The kernels' name of a cache's element type.
int kernel_type(nvinfer1::DataType type) noexcept;

}  // namespace starkv::trt
