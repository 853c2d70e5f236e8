// SPDX-License-Identifier: Apache-2.0
// Plugin of the operator QuantizedKVAttention (starkv/onnx_quantized_kv.py): appends a new token's row to a
// layer's cache of codes and attends to all of it.
#pragma once

#include "operator_plugin.h"
#include "starkv_kernels.h"

namespace starkv::trt {

class QuantizedAttentionPlugin final : public OperatorPlugin {
public:
    struct Attributes {
        std::int32_t query_heads = 0;
        std::int32_t kv_heads = 0;
        std::int32_t bits = 0;
        std::int32_t mrope_section[3] = {};
    };

    static const Signature& operator_signature() noexcept;
    static const nvinfer1::PluginFieldCollection* attributes() noexcept;
    // A new plugin; null, and the reason reported, if an attribute is wrong.
    static QuantizedAttentionPlugin* create(const nvinfer1::PluginFieldCollection* fields) noexcept;

    nvinfer1::IPluginV3* clone() noexcept override;
    const char* getTimingCacheID() noexcept override { return timing_cache_id_; }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    explicit QuantizedAttentionPlugin(const Attributes& given) noexcept;

    bool fits_attributes(const Sizes& sizes) const noexcept override;
    int workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                        std::size_t* bytes) const noexcept override;
    int most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
                             std::size_t* bytes) const noexcept override;
    int launch(const Call& call) const noexcept override;

    starkv_quantized_attention_shape shape_of(const Sizes& sizes,
                                              nvinfer1::DataType cache_type) const noexcept;

    Attributes given_;
    char timing_cache_id_[80];
    nvinfer1::PluginField serialized_[4];
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace starkv::trt
