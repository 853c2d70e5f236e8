// SPDX-License-Identifier: Apache-2.0

#include "kv_attention_plugin.h"

#include <algorithm>
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
    std::int32_t query_heads = 0;
    std::int32_t kv_heads = 0;
    if (!read_fields(kName, fields, {{"num_heads", &query_heads}, {"kv_num_heads", &kv_heads}}))
        return nullptr;
    if (kv_heads < 1 || query_heads < 1 || query_heads % kv_heads != 0) {
        report_error(kName,
                     "attributes num_heads and kv_num_heads must be given, and num_heads a multiple of "
                     "kv_num_heads; %d and %d are not",
                     query_heads, kv_heads);
        return nullptr;
    }
    return new (std::nothrow) KVAttentionPlugin(query_heads, kv_heads);
}

KVAttentionPlugin::KVAttentionPlugin(std::int32_t query_heads, std::int32_t kv_heads) noexcept
    : OperatorPlugin(kSignature), query_heads_(query_heads), kv_heads_(kv_heads) {
    std::snprintf(timing_cache_id_, sizeof(timing_cache_id_), "%d %d", query_heads, kv_heads);
}

nvinfer1::IPluginV3* KVAttentionPlugin::clone() noexcept {
    return new (std::nothrow) KVAttentionPlugin(query_heads_, kv_heads_);
}

const nvinfer1::PluginFieldCollection* KVAttentionPlugin::getFieldsToSerialize() noexcept {
    serialized_[0] = PluginField("num_heads", &query_heads_, PluginFieldType::kINT32, 1);
    serialized_[1] = PluginField("kv_num_heads", &kv_heads_, PluginFieldType::kINT32, 1);
    collection_.nbFields = 2;
    collection_.fields = serialized_;
    return &collection_;
}

bool KVAttentionPlugin::fits_attributes(const Sizes& sizes) const noexcept {
    const std::int64_t dim = sizes.get('D');
    if (sizes.get('G') == kv_heads_ && sizes.get('N') == kv_heads_ * dim &&
        sizes.get('Q') == query_heads_ * dim) {
        return true;
    }
    report_error(kName,
                 "num_heads %d and kv_num_heads %d do not fit q, k and past_k, whose last dimensions are "
                 "%d, %d and %d, and past_k's %d heads",
                 query_heads_, kv_heads_, sizes.get('Q'), sizes.get('N'), sizes.get('D'), sizes.get('G'));
    return false;
}

starkv_attention_shape KVAttentionPlugin::shape_of(const Sizes& sizes,
                                                   nvinfer1::DataType cache_type) const noexcept {
    starkv_attention_shape shape{};
    shape.sequences = sizes.get('B');
    shape.new_tokens = sizes.get('S');
    shape.query_heads = query_heads_;
    shape.kv_heads = kv_heads_;
    shape.head_dim = sizes.get('D');
    shape.capacity = sizes.get('C');
    shape.dtype = kernel_type(cache_type);
    return shape;
}

int KVAttentionPlugin::workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                                       std::size_t* bytes) const noexcept {
    const starkv_attention_shape shape = shape_of(sizes, cache_type);
    return starkv_attention_workspace(&shape, bytes);
}

int KVAttentionPlugin::most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
                                            std::size_t* bytes) const noexcept {
    // Not what the largest sizes need: a single token's attention is split among blocks, whose parts lie in
    // the workspace, but a prompt's is not; and the fewer sequences there are, the more each is split.
    *bytes = 0;
    starkv_attention_shape shape = shape_of(largest, cache_type);
    for (const std::int32_t new_tokens : {1, largest.get('S')}) {
        for (std::int32_t sequences = 1; sequences <= largest.get('B'); ++sequences) {
            shape.new_tokens = new_tokens;
            shape.sequences = sequences;
            std::size_t needed = 0;
            const int status = starkv_attention_workspace(&shape, &needed);
            if (status != STARKV_OK) return status;
            *bytes = std::max(*bytes, needed);
        }
    }
    return STARKV_OK;
}

int KVAttentionPlugin::launch(const Call& call) const noexcept {
    starkv_attention_buffers buffers{};
    buffers.q = call.inputs[kQ];
    buffers.k = call.inputs[kK];
    buffers.v = call.inputs[kV];
    buffers.past_k = call.inputs[kPastK];
    buffers.past_v = call.inputs[kPastV];
    buffers.kv_len = static_cast<const std::int32_t*>(call.inputs[kKvLen]);
    // Where TensorRT keeps present apart from past, the kernels copy it themselves.
    buffers.present_k = call.outputs[kPresentK];
    buffers.present_v = call.outputs[kPresentV];
    buffers.out = call.outputs[kOut];
    const starkv_attention_shape shape = shape_of(call.sizes, call.cache_type);
    return starkv_attention(&shape, &buffers, call.workspace, call.workspace_bytes, call.stream);
}

}  // namespace starkv::trt
