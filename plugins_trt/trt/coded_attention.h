// SPDX-License-Identifier: Apache-2.0
// Attention over a cache of codes: what QuantizedKVAttention and PackableKVAttention have in common. Of their
// sizes B are sequences, G KV heads, Q query heads * head dim, N KV heads * head dim, H half the head dim, R
// bytes of a row of codes and P rows of the tables.
#pragma once

#include "float_attention.h"
#include "operator_plugin.h"
#include "starkv_kernels.h"

namespace starkv::trt {

class CodedAttentionPlugin : public OperatorPlugin {
public:
    struct Attributes {
        AttentionHeads heads;
        std::int32_t bits = 0;
        std::int32_t mrope_section[3] = {};
    };

    static const nvinfer1::PluginFieldCollection* attributes() noexcept;

    const char* getTimingCacheID() noexcept final { return timing_cache_id_; }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept final;

protected:
    // Where an operator has what belongs to its codes. q, k and v are its inputs 0, 1 and 2, out its output
    // 0.
    struct Tensors {
        char capacity;  // the letter of rows of capacity
        int past_k, past_v, kv_len;
        int positions;  // behind which k_scale, v_scale, k_bias, v_bias, cos_table and sin_table follow
        int present_k, present_v;
    };

    CodedAttentionPlugin(const Signature& signature, const Tensors& tensors,
                         const Attributes& given) noexcept;

    // Reports and returns false if an attribute is wrong.
    static bool read_attributes(const char* operator_name, const nvinfer1::PluginFieldCollection* fields,
                                Attributes& given) noexcept;

    bool fits_attributes(const Sizes& sizes) const noexcept override;

    // Each returns a starkv_status.
    int coded_workspace(const Sizes& sizes, nvinfer1::DataType cache_type, std::size_t* bytes) const noexcept;
    // The most that any sizes up to these need.
    int most_coded_workspace(const Sizes& largest, nvinfer1::DataType cache_type,
                             std::size_t* bytes) const noexcept;
    int launch_over_codes(const Call& call) const noexcept;

    const Attributes given_;

private:
    starkv_quantized_attention_shape shape_of(const Sizes& sizes,
                                              nvinfer1::DataType cache_type) const noexcept;

    const Tensors tensors_;
    char timing_cache_id_[80];
    nvinfer1::PluginField serialized_[4];
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace starkv::trt
