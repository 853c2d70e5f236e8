// SPDX-License-Identifier: Apache-2.0
// Plugin of the operator PackableKVAttention (starkv/onnx_packable_kv.py): appends new rows to a layer's
// cache of floats, or a new token's row to one of codes, and attends to all of it.
#pragma once

#include "coded_attention.h"

namespace starkv::trt {

class PackableAttentionPlugin final : public CodedAttentionPlugin {
public:
    static const Signature& operator_signature() noexcept;
    // A new plugin; null, and the reason reported, if an attribute is wrong.
    static PackableAttentionPlugin* create(const nvinfer1::PluginFieldCollection* fields) noexcept;

    nvinfer1::IPluginV3* clone() noexcept override;

private:
    explicit PackableAttentionPlugin(const Attributes& given) noexcept;

    bool fits_attributes(const Sizes& sizes) const noexcept override;
    bool fits_call(const Sizes& sizes) const noexcept override;
    int workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                        std::size_t* bytes) const noexcept override;
    int most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
                             std::size_t* bytes) const noexcept override;
    int launch(const Call& call) const noexcept override;
};

}  // namespace starkv::trt
