// SPDX-License-Identifier: Apache-2.0
// Plugin of the operator KVAttention (starkv/onnx_ops.py): appends new rows to a layer's cache and attends to
// all of it.
#pragma once

#include "float_attention.h"

namespace starkv::trt {

class KVAttentionPlugin final : public OperatorPlugin {
public:
    static const Signature& operator_signature() noexcept;
    static const nvinfer1::PluginFieldCollection* attributes() noexcept;
    // A new plugin; null, and the reason reported, if an attribute is wrong.
    static KVAttentionPlugin* create(const nvinfer1::PluginFieldCollection* fields) noexcept;

    nvinfer1::IPluginV3* clone() noexcept override;
    const char* getTimingCacheID() noexcept override { return timing_cache_id_; }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    explicit KVAttentionPlugin(const AttentionHeads& heads) noexcept;

    bool fits_attributes(const Sizes& sizes) const noexcept override;
    int workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                        std::size_t* bytes) const noexcept override;
    int most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
                             std::size_t* bytes) const noexcept override;
    int launch(const Call& call) const noexcept override;

    AttentionHeads heads_;
    char timing_cache_id_[32];
    nvinfer1::PluginField serialized_[2];
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace starkv::trt
