// SPDX-License-Identifier: Apache-2.0
// Plugin of the operator Compress (starkv/onnx_compress.py): STaR-KV's scoring, selection and compaction of
// all layers in one node.
#pragma once

#include "operator_plugin.h"
#include "starkv_kernels.h"

namespace starkv::trt {

class CompressPlugin final : public OperatorPlugin {
public:
    static const Signature& operator_signature() noexcept;
    static const nvinfer1::PluginFieldCollection* attributes() noexcept;
    // A new plugin; null, and the reason reported, if an attribute is wrong.
    static CompressPlugin* create(const nvinfer1::PluginFieldCollection* fields) noexcept;

    nvinfer1::IPluginV3* clone() noexcept override;
    const char* getTimingCacheID() noexcept override { return timing_cache_id_; }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    CompressPlugin(starkv_pooling pooling, std::int32_t pooling_kernel) noexcept;

    int workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                        std::size_t* bytes) const noexcept override;
    int launch(const Call& call) const noexcept override;

    starkv_compress_shape shape_of(const Sizes& sizes, nvinfer1::DataType cache_type) const noexcept;
    // Gives the outputs that share memory with the destination its contents, where TensorRT keeps them apart.
    bool copy_destination(const Call& call) const noexcept;

    starkv_pooling pooling_;
    std::int32_t pooling_kernel_;
    char timing_cache_id_[32];
    nvinfer1::PluginField serialized_[2];
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace starkv::trt
