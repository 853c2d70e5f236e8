// SPDX-License-Identifier: Apache-2.0

#include "coded_attention.h"

#include <algorithm>
#include <cstdio>

#include "logging.h"
#include "plugin_fields.h"

namespace starkv::trt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace {

enum Input { kQ, kK, kV };

enum Output { kOut };

// Behind the positions.
enum Parameter { kKScale = 1, kVScale, kKBias, kVBias, kCosTable, kSinTable };

}  // namespace

const nvinfer1::PluginFieldCollection* CodedAttentionPlugin::attributes() noexcept {
    static const PluginField fields[] = {PluginField("num_heads", nullptr, PluginFieldType::kINT32, 1),
                                         PluginField("kv_num_heads", nullptr, PluginFieldType::kINT32, 1),
                                         PluginField("bits", nullptr, PluginFieldType::kINT32, 1),
                                         PluginField("mrope_section", nullptr, PluginFieldType::kINT32, 3)};
    static const nvinfer1::PluginFieldCollection collection{4, fields};
    return &collection;
}

bool CodedAttentionPlugin::read_attributes(const char* operator_name,
                                           const nvinfer1::PluginFieldCollection* fields,
                                           Attributes& given) noexcept {
    std::int32_t* const section = given.mrope_section;
    if (!read_fields(operator_name, fields,
                     {{"num_heads", &given.heads.query},
                      {"kv_num_heads", &given.heads.kv},
                      {"bits", &given.bits},
                      {"mrope_section", section, 3}}) ||
        !check_heads(operator_name, given.heads)) {
        return false;
    }
    if (given.bits != 4 && given.bits != 8) {
        report_error(operator_name, "attribute bits must be given, 4 or 8; %d is not", given.bits);
        return false;
    }
    if (std::any_of(section, section + 3, [](std::int32_t pairs) { return pairs < 0; }) ||
        section[0] + section[1] + section[2] == 0) {
        report_error(operator_name,
                     "attribute mrope_section must be given, three numbers of pairs that rotate by t, h and "
                     "w; %d, %d and %d are not",
                     section[0], section[1], section[2]);
        return false;
    }
    return true;
}

CodedAttentionPlugin::CodedAttentionPlugin(const Signature& signature, const Tensors& tensors,
                                           const Attributes& given) noexcept
    : OperatorPlugin(signature), given_(given), tensors_(tensors) {
    std::snprintf(timing_cache_id_, sizeof(timing_cache_id_), "%d %d %d %d %d %d", given.heads.query,
                  given.heads.kv, given.bits, given.mrope_section[0], given.mrope_section[1],
                  given.mrope_section[2]);
}

const nvinfer1::PluginFieldCollection* CodedAttentionPlugin::getFieldsToSerialize() noexcept {
    serialized_[0] = PluginField("num_heads", &given_.heads.query, PluginFieldType::kINT32, 1);
    serialized_[1] = PluginField("kv_num_heads", &given_.heads.kv, PluginFieldType::kINT32, 1);
    serialized_[2] = PluginField("bits", &given_.bits, PluginFieldType::kINT32, 1);
    serialized_[3] = PluginField("mrope_section", given_.mrope_section, PluginFieldType::kINT32, 3);
    collection_.nbFields = 4;
    collection_.fields = serialized_;
    return &collection_;
}

bool CodedAttentionPlugin::fits_attributes(const Sizes& sizes) const noexcept {
    const std::int64_t dim = 2 * static_cast<std::int64_t>(sizes.get('H'));
    const std::int64_t pairs = static_cast<std::int64_t>(given_.mrope_section[0]) + given_.mrope_section[1] +
                               given_.mrope_section[2];
    if (2 * pairs != dim) {
        report_error(getPluginName(), "mrope_section has %lld pairs, but cos_table %d",
                     static_cast<long long>(pairs), sizes.get('H'));
        return false;
    }
    const AttentionHeads& heads = given_.heads;
    if (sizes.get('G') == heads.kv && sizes.get('N') == heads.kv * dim &&
        sizes.get('Q') == heads.query * dim && sizes.get('R') == dim * given_.bits / 8) {
        return true;
    }
    report_error(getPluginName(),
                 "num_heads %d, kv_num_heads %d and bits %d do not fit q, k and cos_table, whose last "
                 "dimensions are %d, %d and %d, and the codes' %d heads and rows of %d bytes",
                 heads.query, heads.kv, given_.bits, sizes.get('Q'), sizes.get('N'), sizes.get('H'),
                 sizes.get('G'), sizes.get('R'));
    return false;
}

starkv_quantized_attention_shape CodedAttentionPlugin::shape_of(
    const Sizes& sizes, nvinfer1::DataType cache_type) const noexcept {
    starkv_quantized_attention_shape shape{};
    shape.sequences = sizes.get('B');
    shape.query_heads = given_.heads.query;
    shape.kv_heads = given_.heads.kv;
    shape.head_dim = 2 * sizes.get('H');
    shape.capacity = sizes.get(tensors_.capacity);
    shape.table_rows = sizes.get('P');
    shape.bits = given_.bits;
    shape.dtype = kernel_type(cache_type);
    std::copy_n(given_.mrope_section, 3, shape.mrope_section);
    return shape;
}

int CodedAttentionPlugin::coded_workspace(const Sizes& sizes, nvinfer1::DataType cache_type,
                                          std::size_t* bytes) const noexcept {
    const starkv_quantized_attention_shape shape = shape_of(sizes, cache_type);
    return starkv_quantized_attention_workspace(&shape, bytes);
}

int CodedAttentionPlugin::most_coded_workspace(const Sizes& largest, nvinfer1::DataType cache_type,
                                               std::size_t* bytes) const noexcept {
    // The fewer sequences there are, the more blocks each is split among, whose parts lie in the workspace.
    *bytes = 0;
    starkv_quantized_attention_shape shape = shape_of(largest, cache_type);
    for (std::int32_t sequences = 1; sequences <= largest.get('B'); ++sequences) {
        shape.sequences = sequences;
        std::size_t needed = 0;
        const int status = starkv_quantized_attention_workspace(&shape, &needed);
        if (status != STARKV_OK) return status;
        *bytes = std::max(*bytes, needed);
    }
    return STARKV_OK;
}

int CodedAttentionPlugin::launch_over_codes(const Call& call) const noexcept {
    const auto floats = [&](Parameter parameter) {
        return static_cast<const float*>(call.inputs[tensors_.positions + parameter]);
    };
    const auto integers = [&](int input) { return static_cast<const std::int32_t*>(call.inputs[input]); };
    starkv_quantized_attention_buffers buffers{};
    buffers.q = call.inputs[kQ];
    buffers.k = call.inputs[kK];
    buffers.v = call.inputs[kV];
    buffers.past_k = call.inputs[tensors_.past_k];
    buffers.past_v = call.inputs[tensors_.past_v];
    buffers.kv_len = integers(tensors_.kv_len);
    buffers.positions = integers(tensors_.positions);
    buffers.k_scale = floats(kKScale);
    buffers.v_scale = floats(kVScale);
    buffers.k_bias = floats(kKBias);
    buffers.v_bias = floats(kVBias);
    buffers.cos_table = floats(kCosTable);
    buffers.sin_table = floats(kSinTable);
    // Where TensorRT keeps present apart from past, the kernels copy it themselves.
    buffers.present_k = call.outputs[tensors_.present_k];
    buffers.present_v = call.outputs[tensors_.present_v];
    buffers.out = call.outputs[kOut];
    const starkv_quantized_attention_shape shape = shape_of(call.sizes, call.cache_type);
    return starkv_quantized_attention(&shape, &buffers, call.workspace, call.workspace_bytes, call.stream);
}

}  // namespace starkv::trt
