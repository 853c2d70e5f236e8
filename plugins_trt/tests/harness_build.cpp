// SPDX-License-Identifier: Apache-2.0
// The build phase: interfaces, output types and shapes, supported types and formats, aliases, workspace.

#include "check.h"
#include "expressions.h"
#include "harness.h"
#include "harness_workspace.h"

namespace starkv::tests {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::TensorFormat;

namespace {

constexpr DataType kCacheTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};

int count(const std::vector<TensorSpec>& tensors) { return static_cast<int>(tensors.size()); }

void check_interfaces(const PluginHandle& plugin) {
    CHECK_EQUAL(std::string(plugin.get()->getInterfaceInfo().kind), "PLUGIN");
    CHECK_EQUAL(std::string(plugin.core()->getInterfaceInfo().kind), "PLUGIN_V3ONE_CORE");
    CHECK_EQUAL(std::string(plugin.build()->getInterfaceInfo().kind), "PLUGIN_V3ONE_BUILD");
    // The version that has aliases.
    CHECK_EQUAL(plugin.build()->getInterfaceInfo().major, 2);
    CHECK_EQUAL(std::string(plugin.runtime()->getInterfaceInfo().kind), "PLUGIN_V3ONE_RUNTIME");
    const std::string device = plugin.build()->getMetadataString();
    CHECK(device == "cuda" || device == "cpu");
}

void check_outputs(const PluginHandle& plugin, const OperatorSpec& spec) {
    CHECK_EQUAL(plugin.build()->getNbOutputs(), count(spec.outputs));
    NumberBuilder builder;
    std::vector<DimsExprs> given(spec.inputs.size()), shapes(spec.outputs.size());
    std::vector<DataType> given_types, types(spec.outputs.size());
    for (std::size_t input = 0; input < given.size(); ++input) {
        const Shape& shape = spec.inputs[input].shape;
        given_types.push_back(spec.inputs[input].type);
        given[input].nbDims = static_cast<std::int32_t>(shape.size());
        for (std::size_t axis = 0; axis < shape.size(); ++axis) {
            given[input].d[axis] = builder.constant(shape[axis]);
        }
    }
    CHECK_EQUAL(plugin.build()->getOutputShapes(given.data(), count(spec.inputs), nullptr, 0, shapes.data(),
                                                count(spec.outputs), builder),
                0);
    CHECK_EQUAL(plugin.build()->getOutputDataTypes(types.data(), count(spec.outputs), given_types.data(),
                                                   count(spec.inputs)),
                0);
    for (std::size_t output = 0; output < shapes.size(); ++output) {
        Shape shape;
        for (std::int32_t axis = 0; axis < shapes[output].nbDims; ++axis) {
            shape.push_back(shapes[output].d[axis]->getConstantValue());
        }
        CHECK(shape == spec.outputs[output].shape);
        CHECK(types[output] == spec.outputs[output].type);
        CHECK_EQUAL(plugin.build()->getAliasedInput(static_cast<std::int32_t>(output)), spec.aliases[output]);
    }
    CHECK_EQUAL(plugin.build()->getAliasedInput(-1), -1);
    CHECK_EQUAL(plugin.build()->getAliasedInput(count(spec.outputs)), -1);

    given[0].nbDims = 2;
    CHECK(plugin.build()->getOutputShapes(given.data(), count(spec.inputs), nullptr, 0, shapes.data(),
                                          count(spec.outputs), builder) != 0);
    CHECK(plugin.build()->getOutputShapes(given.data(), count(spec.inputs) - 1, nullptr, 0, shapes.data(),
                                          count(spec.outputs), builder) != 0);
    CHECK(plugin.build()->getOutputDataTypes(types.data(), count(spec.outputs) - 1, given_types.data(),
                                             count(spec.inputs)) != 0);
}

// Every type and format at every position, the tensors before it being right.
void check_formats(const PluginHandle& plugin, const OperatorSpec& spec, bool cache_type_supported) {
    std::vector<DynamicPluginTensorDesc> tensors = describe_fixed(spec.inputs);
    const std::vector<DynamicPluginTensorDesc> outputs = describe_fixed(spec.outputs);
    tensors.insert(tensors.end(), outputs.begin(), outputs.end());
    for (int position = 0; position < static_cast<int>(tensors.size()); ++position) {
        nvinfer1::PluginTensorDesc& tensor = tensors[static_cast<std::size_t>(position)].desc;
        const nvinfer1::PluginTensorDesc right = tensor;
        for (int type = 0; type < nvinfer1::EnumMax<DataType>(); ++type) {
            for (int format = 0; format < nvinfer1::EnumMax<TensorFormat>(); ++format) {
                tensor.type = static_cast<DataType>(type);
                tensor.format = static_cast<TensorFormat>(format);
                // Inputs of int8, whose numbers nobody reads or which are bytes, may be int32, too.
                const bool is_input = position < count(spec.inputs);
                bool type_fits = tensor.type == right.type || (is_input && right.type == DataType::kINT8 &&
                                                               tensor.type == DataType::kINT32);
                // The first tensor chooses among the cache's types; here `right` is one of many.
                if (position == 0) {
                    const bool float32_allowed =
                        spec.name == "KVCompress" || spec.name == "QuantizedKVAttention";
                    type_fits = tensor.type == DataType::kHALF || tensor.type == DataType::kBF16 ||
                                (float32_allowed && tensor.type == DataType::kFLOAT);
                }
                const bool wanted = type_fits && tensor.format == TensorFormat::kLINEAR;
                CHECK_EQUAL(plugin.build()->supportsFormatCombination(
                                position, tensors.data(), count(spec.inputs), count(spec.outputs)),
                            wanted);
            }
        }
        tensor = right;
    }
    CHECK_EQUAL(
        plugin.build()->supportsFormatCombination(0, tensors.data(), count(spec.inputs), count(spec.outputs)),
        cache_type_supported);
    const int total = static_cast<int>(tensors.size());
    for (const int outside : {-1, total}) {
        CHECK(!plugin.build()->supportsFormatCombination(outside, tensors.data(), count(spec.inputs),
                                                         count(spec.outputs)));
    }
    CHECK(!plugin.build()->supportsFormatCombination(1, tensors.data(), count(spec.inputs) + 1,
                                                     count(spec.outputs)));
}

bool configures(const PluginHandle& plugin, const OperatorSpec& spec) {
    const auto inputs = describe_fixed(spec.inputs), outputs = describe_fixed(spec.outputs);
    return plugin.build()->configurePlugin(inputs.data(), count(spec.inputs), outputs.data(),
                                           count(spec.outputs)) == 0;
}

void check_compress(nvinfer1::IPluginCreatorV3One& creator) {
    const PluginHandle plugin(creator.createPlugin("layer", nullptr, nvinfer1::TensorRTPhase::kBUILD));
    REQUIRE(plugin);
    check_interfaces(plugin);
    for (const DataType type : kCacheTypes) {
        const OperatorSpec spec = compress_spec({}, type);
        check_outputs(plugin, spec);
        check_formats(plugin, spec, true);
        CHECK(configures(plugin, spec));
    }
    CompressSizes odd;
    odd.head_dim = 72;
    CHECK(!configures(plugin, compress_spec(odd, DataType::kHALF)));
    check_compress_workspace(plugin);
}

void check_attention(nvinfer1::IPluginCreatorV3One& creator) {
    Fields fields = attention_fields({});
    const PluginHandle plugin(
        creator.createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kBUILD));
    REQUIRE(plugin);
    check_interfaces(plugin);
    for (const DataType type : kCacheTypes) {
        const OperatorSpec spec = attention_spec({}, type);
        const bool supported = type != DataType::kFLOAT;
        check_outputs(plugin, spec);
        check_formats(plugin, spec, supported);
        CHECK_EQUAL(configures(plugin, spec), supported);
    }
    AttentionSizes other;
    other.kv_heads = 4;
    CHECK(!configures(plugin, attention_spec(other, DataType::kHALF)));
    check_attention_workspace(plugin);
}

void check_full_attention(nvinfer1::IPluginCreatorV3One& creator) {
    Fields fields = full_attention_fields({});
    const PluginHandle plugin(
        creator.createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kBUILD));
    REQUIRE(plugin);
    check_interfaces(plugin);
    for (const DataType type : kCacheTypes) {
        const OperatorSpec spec = full_attention_spec({}, type);
        const bool supported = type != DataType::kFLOAT;
        check_outputs(plugin, spec);
        check_formats(plugin, spec, supported);
        CHECK_EQUAL(configures(plugin, spec), supported);
    }
    FullAttentionSizes other;
    other.head_dim = 72;
    CHECK(!configures(plugin, full_attention_spec(other, DataType::kHALF)));
    other.heads = 1;
    other.head_dim = 63;
    CHECK(!configures(plugin, full_attention_spec(other, DataType::kHALF)));
    const OperatorSpec spec = full_attention_spec({}, DataType::kBF16);
    const auto inputs = describe_fixed(spec.inputs), outputs = describe_fixed(spec.outputs);
    CHECK_EQUAL(plugin.build()->getWorkspaceSize(inputs.data(), 3, outputs.data(), 1), 0U);
}

void check_quantized_attention(nvinfer1::IPluginCreatorV3One& creator) {
    for (const std::int64_t bits : {8, 4}) {
        QuantizedSizes sizes;
        sizes.bits = bits;
        Fields fields = quantized_fields(sizes);
        const PluginHandle plugin(
            creator.createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kBUILD));
        REQUIRE(plugin);
        check_interfaces(plugin);
        for (const DataType type : kCacheTypes) {
            for (const DataType codes : {DataType::kINT8, DataType::kINT32}) {
                sizes.codes = codes;
                const OperatorSpec spec = quantized_spec(sizes, type);
                check_outputs(plugin, spec);
                if (codes == DataType::kINT8) check_formats(plugin, spec, true);
                CHECK(configures(plugin, spec));
            }
        }
        QuantizedSizes other = sizes;
        other.bits = 12 - bits;
        CHECK(!configures(plugin, quantized_spec(other, DataType::kHALF)));
        other = sizes;
        other.head_dim = 80;
        CHECK(!configures(plugin, quantized_spec(other, DataType::kHALF)));
        check_quantized_workspace(plugin, bits);
    }
}

void check_packable_attention(nvinfer1::IPluginCreatorV3One& creator) {
    PackableSizes sizes;
    Fields fields = quantized_fields(sizes.codes);
    const PluginHandle plugin(
        creator.createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kBUILD));
    REQUIRE(plugin);
    check_interfaces(plugin);
    for (const DataType type : kCacheTypes) {
        for (const DataType codes : {DataType::kINT8, DataType::kINT32}) {
            const bool supported = type != DataType::kFLOAT;
            sizes.codes.codes = codes;
            // A profile's largest sizes may be those of no call: several new tokens, and rows of codes.
            const OperatorSpec spec = packable_spec(sizes, type);
            check_outputs(plugin, spec);
            if (codes == DataType::kINT8) check_formats(plugin, spec, supported);
            CHECK_EQUAL(configures(plugin, spec), supported);
        }
    }
    PackableSizes other;
    other.codes.bits = 4;
    CHECK(!configures(plugin, packable_spec(other, DataType::kHALF)));
    other = PackableSizes();
    other.floats.kv_heads = 4;
    CHECK(!configures(plugin, packable_spec(other, DataType::kHALF)));
    check_packable_workspace(plugin);
}

}  // namespace

void check_build(const Creators& creators) {
    check_compress(creators.compress);
    check_attention(creators.kv_attention);
    check_full_attention(creators.full_attention);
    check_quantized_attention(creators.quantized_attention);
    check_packable_attention(creators.packable_attention);
}

}  // namespace starkv::tests
