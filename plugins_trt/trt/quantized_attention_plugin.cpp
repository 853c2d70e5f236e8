// SPDX-License-Identifier: Apache-2.0

#include "quantized_attention_plugin.h"

#include <algorithm>
#include <cstdio>
#include <new>

#include "logging.h"
#include "plugin_fields.h"

namespace starkv::trt {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kName = "QuantizedKVAttention";

enum Input {
    kQ,
    kK,
    kV,
    kPastK,
    kPastV,
    kKvLen,
    kPositions,
    kKScale,
    kVScale,
    kKBias,
    kVBias,
    kCosTable,
    kSinTable,
    kInputCount
};

enum Output { kOut, kPresentK, kPresentV, kOutputCount };

// B sequences, G KV heads, C rows of capacity, R bytes of a row, P rows of the tables; Q is query heads *
// head dim, N KV heads * head dim, H half the head dim. Codes are carried as bytes whatever their bits:
// TensorRT has no uint8 tensors within a network.
constexpr TensorRule kInputs[kInputCount] = {
    {"q", Element::kCache, "B 1 Q"},         {"k", Element::kCache, "B 1 N"},
    {"v", Element::kCache, "B 1 N"},         {"past_k", Element::kBytes, "B G C R"},
    {"past_v", Element::kBytes, "B G C R"},  {"kv_len", Element::kInt32, "B"},
    {"positions", Element::kInt32, "B C 3"}, {"k_scale", Element::kFloat32, "N"},
    {"v_scale", Element::kFloat32, "N"},     {"k_bias", Element::kFloat32, "N"},
    {"v_bias", Element::kFloat32, "N"},      {"cos_table", Element::kFloat32, "P H"},
    {"sin_table", Element::kFloat32, "P H"},
};

constexpr TensorRule kOutputs[kOutputCount] = {
    {"out", Element::kCache, "B 1 Q"},
    {"present_k", Element::kBytes, "B G C R", kPastK},
    {"present_v", Element::kBytes, "B G C R", kPastV},
};

constexpr Signature kSignature{kName, kInputs, kInputCount, kOutputs, kOutputCount, true};

}  // namespace

const Signature& QuantizedAttentionPlugin::operator_signature() noexcept { return kSignature; }

const nvinfer1::PluginFieldCollection* QuantizedAttentionPlugin::attributes() noexcept {
    static const PluginField fields[] = {PluginField("num_heads", nullptr, PluginFieldType::kINT32, 1),
                                         PluginField("kv_num_heads", nullptr, PluginFieldType::kINT32, 1),
                                         PluginField("bits", nullptr, PluginFieldType::kINT32, 1),
                                         PluginField("mrope_section", nullptr, PluginFieldType::kINT32, 3)};
    static const nvinfer1::PluginFieldCollection collection{4, fields};
    return &collection;
}

QuantizedAttentionPlugin* QuantizedAttentionPlugin::create(
    const nvinfer1::PluginFieldCollection* fields) noexcept {
    Attributes given;
    std::int32_t* const section = given.mrope_section;
    if (!read_fields(kName, fields,
                     {{"num_heads", &given.query_heads},
                      {"kv_num_heads", &given.kv_heads},
                      {"bits", &given.bits},
                      {"mrope_section", section, 3}}))
        return nullptr;
    if (given.kv_heads < 1 || given.query_heads < 1 || given.query_heads % given.kv_heads != 0) {
        report_error(kName,
                     "attributes num_heads and kv_num_heads must be given, and num_heads a multiple of "
                     "kv_num_heads; %d and %d are not",
                     given.query_heads, given.kv_heads);
        return nullptr;
    }
    if (given.bits != 4 && given.bits != 8) {
        report_error(kName, "attribute bits must be given, 4 or 8; %d is not", given.bits);
        return nullptr;
    }
    if (std::any_of(section, section + 3, [](std::int32_t pairs) { return pairs < 0; }) ||
        section[0] + section[1] + section[2] == 0) {
        report_error(kName,
                     "attribute mrope_section must be given, three numbers of pairs that rotate by t, h and "
                     "w; %d, %d and %d are not",
                     section[0], section[1], section[2]);
        return nullptr;
    }
    return new (std::nothrow) QuantizedAttentionPlugin(given);
}

QuantizedAttentionPlugin::QuantizedAttentionPlugin(const Attributes& given) noexcept
    : OperatorPlugin(kSignature), given_(given) {
    std::snprintf(timing_cache_id_, sizeof(timing_cache_id_), "%d %d %d %d %d %d", given.query_heads,
                  given.kv_heads, given.bits, given.mrope_section[0], given.mrope_section[1],
                  given.mrope_section[2]);
}

nvinfer1::IPluginV3* QuantizedAttentionPlugin::clone() noexcept {
    return new (std::nothrow) QuantizedAttentionPlugin(given_);
}

const nvinfer1::PluginFieldCollection* QuantizedAttentionPlugin::getFieldsToSerialize() noexcept {
    serialized_[0] = PluginField("num_heads", &given_.query_heads, PluginFieldType::kINT32, 1);
    serialized_[1] = PluginField("kv_num_heads", &given_.kv_heads, PluginFieldType::kINT32, 1);
    serialized_[2] = PluginField("bits", &given_.bits, PluginFieldType::kINT32, 1);
    serialized_[3] = PluginField("mrope_section", given_.mrope_section, PluginFieldType::kINT32, 3);
    collection_.nbFields = 4;
    collection_.fields = serialized_;
    return &collection_;
}

bool QuantizedAttentionPlugin::fits_attributes(const Sizes& sizes) const noexcept {
    const std::int64_t dim = 2 * static_cast<std::int64_t>(sizes.get('H'));
    const std::int64_t pairs = static_cast<std::int64_t>(given_.mrope_section[0]) + given_.mrope_section[1] +
                               given_.mrope_section[2];
    if (2 * pairs != dim) {
        report_error(kName, "mrope_section has %lld pairs, but cos_table %d", static_cast<long long>(pairs),
                     sizes.get('H'));
        return false;
    }
    if (sizes.get('G') == given_.kv_heads && sizes.get('N') == given_.kv_heads * dim &&
        sizes.get('Q') == given_.query_heads * dim && sizes.get('R') == dim * given_.bits / 8) {
        return true;
    }
    report_error(kName,
                 "num_heads %d, kv_num_heads %d and bits %d do not fit q, k and cos_table, whose last "
                 "dimensions are %d, %d and %d, and past_k's %d heads and rows of %d bytes",
                 given_.query_heads, given_.kv_heads, given_.bits, sizes.get('Q'), sizes.get('N'),
                 sizes.get('H'), sizes.get('G'), sizes.get('R'));
    return false;
}

starkv_quantized_attention_shape QuantizedAttentionPlugin::shape_of(
    const Sizes& sizes, nvinfer1::DataType cache_type) const noexcept {
    starkv_quantized_attention_shape shape{};
    shape.sequences = sizes.get('B');
    shape.query_heads = given_.query_heads;
    shape.kv_heads = given_.kv_heads;
    shape.head_dim = 2 * sizes.get('H');
    shape.capacity = sizes.get('C');
    shape.table_rows = sizes.get('P');
    shape.bits = given_.bits;
    shape.dtype = kernel_type(cache_type);
    std::copy_n(given_.mrope_section, 3, shape.mrope_section);
    return shape;
}

int QuantizedAttentionPlugin::workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                                              std::size_t* bytes) const noexcept {
    const starkv_quantized_attention_shape shape = shape_of(sizes, cache_type);
    return starkv_quantized_attention_workspace(&shape, bytes);
}

int QuantizedAttentionPlugin::most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
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

int QuantizedAttentionPlugin::launch(const Call& call) const noexcept {
    const auto floats = [&](Input input) { return static_cast<const float*>(call.inputs[input]); };
    const auto integers = [&](Input input) { return static_cast<const std::int32_t*>(call.inputs[input]); };
    starkv_quantized_attention_buffers buffers{};
    buffers.q = call.inputs[kQ];
    buffers.k = call.inputs[kK];
    buffers.v = call.inputs[kV];
    buffers.past_k = call.inputs[kPastK];
    buffers.past_v = call.inputs[kPastV];
    buffers.kv_len = integers(kKvLen);
    buffers.positions = integers(kPositions);
    buffers.k_scale = floats(kKScale);
    buffers.v_scale = floats(kVScale);
    buffers.k_bias = floats(kKBias);
    buffers.v_bias = floats(kVBias);
    buffers.cos_table = floats(kCosTable);
    buffers.sin_table = floats(kSinTable);
    // Where TensorRT keeps present apart from past, the kernels copy it themselves.
    buffers.present_k = call.outputs[kPresentK];
    buffers.present_v = call.outputs[kPresentV];
    buffers.out = call.outputs[kOut];
    const starkv_quantized_attention_shape shape = shape_of(call.sizes, call.cache_type);
    return starkv_quantized_attention(&shape, &buffers, call.workspace, call.workspace_bytes, call.stream);
}

}  // namespace starkv::trt
