// SPDX-License-Identifier: Apache-2.0
// Plugin of the operator QuantizedKVAttention (starkv/onnx_quantized_kv.py): appends a new token's row to a
// layer's cache of codes and attends to all of it.
#pragma once

#include "coded_attention.h"

namespace starkv::trt {

class QuantizedAttentionPlugin final : public CodedAttentionPlugin {
public:
    static const Signature& operator_signature() noexcept;
    // A new plugin; null, and the reason reported, if an attribute is wrong.
    static QuantizedAttentionPlugin* create(const nvinfer1::PluginFieldCollection* fields) noexcept;

    nvinfer1::IPluginV3* clone() noexcept override;

private:
    explicit QuantizedAttentionPlugin(const Attributes& given) noexcept;

    int workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                        std::size_t* bytes) const noexcept override;
    int most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
                             std::size_t* bytes) const noexcept override;
    int launch(const Call& call) const noexcept override;
};

}  // namespace starkv::trt
