// SPDX-License-Identifier: Apache-2.0

#include "quantized_attention_plugin.h"

#include <new>

namespace starkv::trt {

namespace {

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

QuantizedAttentionPlugin* QuantizedAttentionPlugin::create(
    const nvinfer1::PluginFieldCollection* fields) noexcept {
    Attributes given;
    return read_attributes(kName, fields, given) ? new (std::nothrow) QuantizedAttentionPlugin(given)
                                                 : nullptr;
}

QuantizedAttentionPlugin::QuantizedAttentionPlugin(const Attributes& given) noexcept
    : CodedAttentionPlugin(kSignature, {'C', kPastK, kPastV, kKvLen, kPositions, kPresentK, kPresentV},
                           given) {}

nvinfer1::IPluginV3* QuantizedAttentionPlugin::clone() noexcept {
    return new (std::nothrow) QuantizedAttentionPlugin(given_);
}

int QuantizedAttentionPlugin::workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                                              std::size_t* bytes) const noexcept {
    return coded_workspace(sizes, cache_type, bytes);
}

int QuantizedAttentionPlugin::most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
                                                   std::size_t* bytes) const noexcept {
    return most_coded_workspace(largest, cache_type, bytes);
}

int QuantizedAttentionPlugin::launch(const Call& call) const noexcept { return launch_over_codes(call); }

}  // namespace starkv::trt
