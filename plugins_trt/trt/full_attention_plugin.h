// SPDX-License-Identifier: Apache-2.0
// Plugin of the operator FullAttention (starkv/onnx_ops.py): every token attends to every other.
//
// TensorRT's own attention would do, where it fuses. Where it does not, it stores all scores: gigabytes for
// one screenshot.
#pragma once

#include "operator_plugin.h"
#include "starkv_kernels.h"

namespace starkv::trt {

class FullAttentionPlugin final : public OperatorPlugin {
public:
    static const Signature& operator_signature() noexcept;
    static const nvinfer1::PluginFieldCollection* attributes() noexcept;
    // A new plugin; null, and the reason reported, if an attribute is wrong.
    static FullAttentionPlugin* create(const nvinfer1::PluginFieldCollection* fields) noexcept;

    nvinfer1::IPluginV3* clone() noexcept override;
    const char* getTimingCacheID() noexcept override { return timing_cache_id_; }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    explicit FullAttentionPlugin(std::int32_t heads) noexcept;

    bool fits_attributes(const Sizes& sizes) const noexcept override;
    int workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                        std::size_t* bytes) const noexcept override;
    int launch(const Call& call) const noexcept override;

    starkv_full_attention_shape shape_of(const Sizes& sizes, nvinfer1::DataType cache_type) const noexcept;

    std::int32_t heads_;
    char timing_cache_id_[16];
    nvinfer1::PluginField serialized_[1];
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace starkv::trt
