// SPDX-License-Identifier: Apache-2.0

#include "full_attention_plugin.h"

#include <cstdio>
#include <new>

#include "logging.h"
#include "plugin_fields.h"

namespace starkv::trt {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kName = "FullAttention";

enum Input { kQ, kK, kV, kInputCount };

enum Output { kOut, kOutputCount };

// B sequences, N tokens; Q is heads * head dim.
constexpr TensorRule kInputs[kInputCount] = {
    {"q", Element::kCache, "B N Q"},
    {"k", Element::kCache, "B N Q"},
    {"v", Element::kCache, "B N Q"},
};

constexpr TensorRule kOutputs[kOutputCount] = {{"out", Element::kCache, "B N Q"}};

constexpr Signature kSignature{kName, kInputs, kInputCount, kOutputs, kOutputCount, false};

}  // namespace

const Signature& FullAttentionPlugin::operator_signature() noexcept { return kSignature; }

const nvinfer1::PluginFieldCollection* FullAttentionPlugin::attributes() noexcept {
    static const PluginField fields[] = {PluginField("num_heads", nullptr, PluginFieldType::kINT32, 1)};
    static const nvinfer1::PluginFieldCollection collection{1, fields};
    return &collection;
}

FullAttentionPlugin* FullAttentionPlugin::create(const nvinfer1::PluginFieldCollection* fields) noexcept {
    std::int32_t heads = 0;
    if (!read_fields(kName, fields, {{"num_heads", &heads}})) return nullptr;
    if (heads < 1) {
        report_error(kName, "attribute num_heads must be given and at least 1; %d is not", heads);
        return nullptr;
    }
    return new (std::nothrow) FullAttentionPlugin(heads);
}

FullAttentionPlugin::FullAttentionPlugin(std::int32_t heads) noexcept
    : OperatorPlugin(kSignature), heads_(heads) {
    std::snprintf(timing_cache_id_, sizeof(timing_cache_id_), "%d", heads);
}

nvinfer1::IPluginV3* FullAttentionPlugin::clone() noexcept {
    return new (std::nothrow) FullAttentionPlugin(heads_);
}

const nvinfer1::PluginFieldCollection* FullAttentionPlugin::getFieldsToSerialize() noexcept {
    serialized_[0] = PluginField("num_heads", &heads_, PluginFieldType::kINT32, 1);
    collection_.nbFields = 1;
    collection_.fields = serialized_;
    return &collection_;
}

bool FullAttentionPlugin::fits_attributes(const Sizes& sizes) const noexcept {
    if (sizes.get('Q') > 0 && sizes.get('Q') % heads_ == 0) return true;
    report_error(kName, "the last dimension of q, %d, is no multiple of num_heads, %d", sizes.get('Q'),
                 heads_);
    return false;
}

starkv_full_attention_shape FullAttentionPlugin::shape_of(const Sizes& sizes,
                                                          nvinfer1::DataType cache_type) const noexcept {
    starkv_full_attention_shape shape{};
    shape.sequences = sizes.get('B');
    shape.tokens = sizes.get('N');
    shape.heads = heads_;
    shape.head_dim = sizes.get('Q') / heads_;
    shape.dtype = kernel_type(cache_type);
    return shape;
}

int FullAttentionPlugin::workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                                         std::size_t* bytes) const noexcept {
    const starkv_full_attention_shape shape = shape_of(sizes, cache_type);
    return starkv_full_attention_workspace(&shape, bytes);
}

int FullAttentionPlugin::launch(const Call& call) const noexcept {
    const starkv_full_attention_shape shape = shape_of(call.sizes, call.cache_type);
    return starkv_full_attention(&shape, call.inputs[kQ], call.inputs[kK], call.inputs[kV],
                                 call.outputs[kOut], call.stream);
}

}  // namespace starkv::trt
