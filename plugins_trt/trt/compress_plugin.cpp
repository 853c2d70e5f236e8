// SPDX-License-Identifier: Apache-2.0

#include "compress_plugin.h"

#include <cstdio>
#include <cstring>
#include <new>
#include <string_view>

#include "device_copy.h"
#include "logging.h"
#include "plugin_fields.h"

namespace starkv::trt {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// Not Compress, as the operator is called: TensorRT's ONNX parser looks at names without their domain, and
// refuses ONNX's own Compress, which it does not support (onnxOpCheckers.cpp).
constexpr const char* kName = "KVCompress";
constexpr const char* kAveragePooling = "avgpool";
constexpr const char* kMaximumPooling = "maxpool";

enum Input {
    kK,
    kV,
    kQWindow,
    kHiddenNorm,
    kKvLen,
    kRowMeta,
    kFrame,
    kParameters,
    kLimits,
    kMiEma,
    kPatternEma,
    kTemperature,
    kDstK,
    kDstV,
    kDstMeta,
    kSlot,
    kInputCount
};

enum Output {
    kNewK,
    kNewV,
    kNewMeta,
    kNewLen,
    kRows,
    kScores,
    kStages,
    kNewMiEma,
    kNewPatternEma,
    kNewTemperature,
    kOutputCount
};

// L layers, B sequences, G KV heads, H query heads, W window, C rows of capacity, D head dim, V length of a
// pattern, S slots, E rows of a slot.
constexpr TensorRule kInputs[kInputCount] = {
    {"k", Element::kCache, "L B G C D"},
    {"v", Element::kCache, "L B G C D"},
    {"q_window", Element::kCache, "L B H W D"},
    {"hidden_norm", Element::kFloat32, "L B C"},
    {"kv_len", Element::kInt32, "L B"},
    {"row_meta", Element::kInt32, "L B C 4"},
    {"frame", Element::kInt32, "5"},
    {"parameters", Element::kFloat32, "23"},
    {"limits", Element::kInt64, "3"},
    {"mi_ema", Element::kFloat32, "L B G"},
    {"pattern_ema", Element::kFloat32, "L B G V"},
    {"temperature", Element::kFloat32, "L B"},
    {"dst_k", Element::kCache, "L S G E D"},
    {"dst_v", Element::kCache, "L S G E D"},
    {"dst_meta", Element::kInt32, "L S E 4"},
    {"slot", Element::kInt32, "B"},
};

// `rows` has room for a whole slot: the definition's width is the most rows of any layer, which depends on
// data, but the shapes of a plugin's outputs depend on shapes alone.
constexpr TensorRule kOutputs[kOutputCount] = {
    {"new_k", Element::kCache, "L S G E D", kDstK},
    {"new_v", Element::kCache, "L S G E D", kDstV},
    {"new_meta", Element::kInt32, "L S E 4", kDstMeta},
    {"new_len", Element::kInt32, "L B"},
    {"rows", Element::kInt64, "L B 1 E"},
    {"scores", Element::kFloat32, "L B C"},
    {"stages", Element::kFloat32, "L B 4 C"},
    {"new_mi_ema", Element::kFloat32, "L B G"},
    {"new_pattern_ema", Element::kFloat32, "L B G V"},
    {"new_temperature", Element::kFloat32, "L B"},
};

constexpr Signature kSignature{kName, kInputs, kInputCount, kOutputs, kOutputCount, true};

bool parse_pooling(std::string_view text, starkv_pooling& pooling) {
    if (text == kAveragePooling) {
        pooling = STARKV_AVGPOOL;
    } else if (text == kMaximumPooling) {
        pooling = STARKV_MAXPOOL;
    } else {
        report_error(kName, "attribute pooling must be %s or %s, not '%.*s'", kAveragePooling,
                     kMaximumPooling, static_cast<int>(text.size()), text.data());
        return false;
    }
    return true;
}

const char* pooling_name(starkv_pooling pooling) {
    return pooling == STARKV_AVGPOOL ? kAveragePooling : kMaximumPooling;
}

}  // namespace

const Signature& CompressPlugin::operator_signature() noexcept { return kSignature; }

const nvinfer1::PluginFieldCollection* CompressPlugin::attributes() noexcept {
    static const PluginField fields[] = {PluginField("pooling", nullptr, PluginFieldType::kCHAR, 1),
                                         PluginField("pooling_kernel", nullptr, PluginFieldType::kINT32, 1)};
    static const nvinfer1::PluginFieldCollection collection{2, fields};
    return &collection;
}

CompressPlugin* CompressPlugin::create(const nvinfer1::PluginFieldCollection* fields) noexcept {
    std::string_view pooling_text = kAveragePooling;
    std::int32_t pooling_kernel = 5;
    if (!read_fields(kName, fields, {{"pooling", &pooling_text}, {"pooling_kernel", &pooling_kernel}})) {
        return nullptr;
    }
    starkv_pooling pooling{};
    if (!parse_pooling(pooling_text, pooling)) return nullptr;
    constexpr std::int32_t kWidestKernel = 63;
    if (pooling_kernel < 1 || pooling_kernel > kWidestKernel || pooling_kernel % 2 == 0) {
        report_error(kName, "attribute pooling_kernel must be odd and in 1 ... %d, not %d", kWidestKernel,
                     pooling_kernel);
        return nullptr;
    }
    return new (std::nothrow) CompressPlugin(pooling, pooling_kernel);
}

CompressPlugin::CompressPlugin(starkv_pooling pooling, std::int32_t pooling_kernel) noexcept
    : OperatorPlugin(kSignature), pooling_(pooling), pooling_kernel_(pooling_kernel) {
    std::snprintf(timing_cache_id_, sizeof(timing_cache_id_), "%s %d", pooling_name(pooling), pooling_kernel);
}

nvinfer1::IPluginV3* CompressPlugin::clone() noexcept {
    return new (std::nothrow) CompressPlugin(pooling_, pooling_kernel_);
}

const nvinfer1::PluginFieldCollection* CompressPlugin::getFieldsToSerialize() noexcept {
    const char* pooling = pooling_name(pooling_);
    serialized_[0] = PluginField("pooling", pooling, PluginFieldType::kCHAR,
                                 static_cast<std::int32_t>(std::strlen(pooling)));
    serialized_[1] = PluginField("pooling_kernel", &pooling_kernel_, PluginFieldType::kINT32, 1);
    collection_.nbFields = 2;
    collection_.fields = serialized_;
    return &collection_;
}

starkv_compress_shape CompressPlugin::shape_of(const Sizes& sizes,
                                               nvinfer1::DataType cache_type) const noexcept {
    starkv_compress_shape shape{};
    shape.layers = sizes.get('L');
    shape.sequences = sizes.get('B');
    shape.kv_heads = sizes.get('G');
    shape.query_heads = sizes.get('H');
    shape.window = sizes.get('W');
    shape.head_dim = sizes.get('D');
    shape.capacity = sizes.get('C');
    shape.slots = sizes.get('S');
    shape.slot_capacity = sizes.get('E');
    shape.pattern_capacity = sizes.get('V');
    shape.dtype = kernel_type(cache_type);
    shape.pooling = pooling_;
    shape.pooling_kernel = pooling_kernel_;
    return shape;
}

int CompressPlugin::workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                                    std::size_t* bytes) const noexcept {
    const starkv_compress_shape shape = shape_of(sizes, cache_type);
    return starkv_compress_workspace(&shape, bytes);
}

bool CompressPlugin::copy_destination(const Call& call) const noexcept {
    for (int output = 0; output < kOutputCount; ++output) {
        const int input = kOutputs[output].aliased_input;
        if (input < 0 || call.outputs[output] == call.inputs[input]) continue;
        // Slots that this call does not write must survive it.
        if (!copy_on_stream(call.outputs[output], call.inputs[input], byte_count(call.output_descs[output]),
                            call.stream)) {
            return false;
        }
    }
    return true;
}

int CompressPlugin::launch(const Call& call) const noexcept {
    if (!copy_destination(call)) return STARKV_ERROR_LAUNCH;
    const auto in = [&](Input input) { return call.inputs[input]; };
    const auto out = [&](Output output) { return call.outputs[output]; };
    starkv_compress_buffers buffers{};
    buffers.k = in(kK);
    buffers.v = in(kV);
    buffers.q_window = in(kQWindow);
    buffers.hidden_norm = static_cast<const float*>(in(kHiddenNorm));
    buffers.kv_len = static_cast<const std::int32_t*>(in(kKvLen));
    buffers.row_meta = static_cast<const std::int32_t*>(in(kRowMeta));
    buffers.frame = static_cast<const std::int32_t*>(in(kFrame));
    buffers.parameters = static_cast<const float*>(in(kParameters));
    buffers.limits = static_cast<const std::int64_t*>(in(kLimits));
    buffers.mi_ema = static_cast<const float*>(in(kMiEma));
    buffers.pattern_ema = static_cast<const float*>(in(kPatternEma));
    buffers.temperature = static_cast<const float*>(in(kTemperature));
    buffers.slot = static_cast<const std::int32_t*>(in(kSlot));
    buffers.dst_k = out(kNewK);
    buffers.dst_v = out(kNewV);
    buffers.dst_meta = static_cast<std::int32_t*>(out(kNewMeta));
    buffers.new_len = static_cast<std::int32_t*>(out(kNewLen));
    buffers.rows = static_cast<std::int64_t*>(out(kRows));
    buffers.scores = static_cast<float*>(out(kScores));
    buffers.stages = static_cast<float*>(out(kStages));
    buffers.new_mi_ema = static_cast<float*>(out(kNewMiEma));
    buffers.new_pattern_ema = static_cast<float*>(out(kNewPatternEma));
    buffers.new_temperature = static_cast<float*>(out(kNewTemperature));
    const starkv_compress_shape shape = shape_of(call.sizes, call.cache_type);
    return starkv_compress(&shape, &buffers, call.workspace, call.workspace_bytes, call.stream);
}

}  // namespace starkv::trt
