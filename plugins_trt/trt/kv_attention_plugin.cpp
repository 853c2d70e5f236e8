// SPDX-License-Identifier: Apache-2.0

#include "kv_attention_plugin.h"

#include <cstdio>
#include <new>

#include "logging.h"
#include "plugin_fields.h"

namespace starkv::trt {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kName = "KVAttention";

enum Input { kQ, kK, kV, kPastK, kPastV, kKvLen, kPastExtent, kInputCount };

enum Output { kOut, kPresentK, kPresentV, kOutputCount };

// B sequences, S new tokens, G KV heads, C rows of capacity, D head dim; Q is query heads * D, N is G * D.
// past_extent carries the host's count of rows in its shape and has no data, so P may be 0. An engine passes
// kv_len a second time: TensorRT has no int8 tensors but quantized ones.
constexpr TensorRule kInputs[kInputCount] = {
    {"q", Element::kCache, "B S Q"},           {"k", Element::kCache, "B S N"},
    {"v", Element::kCache, "B S N"},           {"past_k", Element::kCache, "B G C D"},
    {"past_v", Element::kCache, "B G C D"},    {"kv_len", Element::kInt32, "B"},
    {"past_extent", Element::kShapeOnly, "P"},
};

constexpr TensorRule kOutputs[kOutputCount] = {
    {"out", Element::kCache, "B S Q"},
    {"present_k", Element::kCache, "B G C D", kPastK},
    {"present_v", Element::kCache, "B G C D", kPastV},
};

constexpr Signature kSignature{kName, kInputs, kInputCount, kOutputs, kOutputCount, false};

}  // namespace

const Signature& KVAttentionPlugin::operator_signature() noexcept { return kSignature; }

const nvinfer1::PluginFieldCollection* KVAttentionPlugin::attributes() noexcept {
    static const PluginField fields[] = {PluginField("num_heads", nullptr, PluginFieldType::kINT32, 1),
                                         PluginField("kv_num_heads", nullptr, PluginFieldType::kINT32, 1)};
    static const nvinfer1::PluginFieldCollection collection{2, fields};
    return &collection;
}

KVAttentionPlugin* KVAttentionPlugin::create(const nvinfer1::PluginFieldCollection* fields) noexcept {
    AttentionHeads heads;
    if (!read_fields(kName, fields, {{"num_heads", &heads.query}, {"kv_num_heads", &heads.kv}}) ||
        !check_heads(kName, heads)) {
        return nullptr;
    }
    return new (std::nothrow) KVAttentionPlugin(heads);
}

KVAttentionPlugin::KVAttentionPlugin(const AttentionHeads& heads) noexcept
    : OperatorPlugin(kSignature), heads_(heads) {
    std::snprintf(timing_cache_id_, sizeof(timing_cache_id_), "%d %d", heads.query, heads.kv);
}

nvinfer1::IPluginV3* KVAttentionPlugin::clone() noexcept {
    return new (std::nothrow) KVAttentionPlugin(heads_);
}

const nvinfer1::PluginFieldCollection* KVAttentionPlugin::getFieldsToSerialize() noexcept {
    serialized_[0] = PluginField("num_heads", &heads_.query, PluginFieldType::kINT32, 1);
    serialized_[1] = PluginField("kv_num_heads", &heads_.kv, PluginFieldType::kINT32, 1);
    collection_.nbFields = 2;
    collection_.fields = serialized_;
    return &collection_;
}

bool KVAttentionPlugin::fits_attributes(const Sizes& sizes) const noexcept {
    const std::int64_t dim = sizes.get('D');
    if (sizes.get('G') == heads_.kv && sizes.get('N') == heads_.kv * dim &&
        sizes.get('Q') == heads_.query * dim) {
        return true;
    }
    report_error(kName,
                 "num_heads %d and kv_num_heads %d do not fit q, k and past_k, whose last dimensions are "
                 "%d, %d and %d, and past_k's %d heads",
                 heads_.query, heads_.kv, sizes.get('Q'), sizes.get('N'), sizes.get('D'), sizes.get('G'));
    return false;
}

int KVAttentionPlugin::workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                                       std::size_t* bytes) const noexcept {
    return float_attention_workspace(heads_, sizes, cache_type, bytes);
}

int KVAttentionPlugin::most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
                                            std::size_t* bytes) const noexcept {
    return most_float_attention_workspace(heads_, largest, cache_type, bytes);
}

int KVAttentionPlugin::launch(const Call& call) const noexcept {
    return launch_float_attention(heads_, call);
}

}  // namespace starkv::trt
