// SPDX-License-Identifier: Apache-2.0

#include "tensor_specs.h"

#include <algorithm>

namespace starkv::tests {

using nvinfer1::DataType;

OperatorSpec compress_spec(const CompressSizes& sizes, DataType cache) {
    const std::int64_t l = sizes.layers, b = sizes.sequences, g = sizes.kv_heads, c = sizes.capacity;
    const std::int64_t d = sizes.head_dim, s = sizes.slots, e = sizes.slot_capacity, v = sizes.pattern;
    const DataType f32 = DataType::kFLOAT, i32 = DataType::kINT32, i64 = DataType::kINT64;
    return {"KVCompress",
            {
                {cache, {l, b, g, c, d}},
                {cache, {l, b, g, c, d}},
                {cache, {l, b, sizes.query_heads, sizes.window, d}},
                {f32, {l, b, c}},
                {i32, {l, b}},
                {i32, {l, b, c, 4}},
                {i32, {5}},
                {f32, {23}},
                {i64, {3}},
                {f32, {l, b, g}},
                {f32, {l, b, g, v}},
                {f32, {l, b}},
                {cache, {l, s, g, e, d}},
                {cache, {l, s, g, e, d}},
                {i32, {l, s, e, 4}},
                {i32, {b}},
            },
            {
                {cache, {l, s, g, e, d}},
                {cache, {l, s, g, e, d}},
                {i32, {l, s, e, 4}},
                {i32, {l, b}},
                {i64, {l, b, 1, e}},
                {f32, {l, b, c}},
                {f32, {l, b, 4, c}},
                {f32, {l, b, g}},
                {f32, {l, b, g, v}},
                {f32, {l, b}},
            },
            {12, 13, 14, -1, -1, -1, -1, -1, -1, -1}};
}

OperatorSpec attention_spec(const AttentionSizes& sizes, DataType cache) {
    const std::int64_t b = sizes.sequences, s = sizes.new_tokens, d = sizes.head_dim;
    const Shape query{b, s, sizes.query_heads * d};
    const Shape rows{b, s, sizes.kv_heads * d};
    const Shape past{b, sizes.kv_heads, sizes.capacity, d};
    return {"KVAttention",
            {{cache, query},
             {cache, rows},
             {cache, rows},
             {cache, past},
             {cache, past},
             {DataType::kINT32, {b}},
             {sizes.past_extent_type, {sizes.past_extent}}},
            {{cache, query}, {cache, past}, {cache, past}},
            {-1, 3, 4}};
}

Fields attention_fields(const AttentionSizes& sizes) {
    Fields fields;
    fields.add("num_heads", static_cast<std::int32_t>(sizes.query_heads));
    fields.add("kv_num_heads", static_cast<std::int32_t>(sizes.kv_heads));
    return fields;
}

OperatorSpec full_attention_spec(const FullAttentionSizes& sizes, DataType cache) {
    const TensorSpec tokens{cache, {sizes.sequences, sizes.tokens, sizes.heads * sizes.head_dim}};
    return {"FullAttention", {tokens, tokens, tokens}, {tokens}, {-1}};
}

Fields full_attention_fields(const FullAttentionSizes& sizes) {
    return Fields().add("num_heads", static_cast<std::int32_t>(sizes.heads));
}

OperatorSpec quantized_spec(const QuantizedSizes& sizes, DataType type) {
    const std::int64_t b = sizes.sequences, d = sizes.head_dim, kv = sizes.kv_heads * d;
    const std::int64_t code_bytes = sizes.codes == DataType::kINT32 ? 4 : 1;
    const DataType f32 = DataType::kFLOAT, i32 = DataType::kINT32;
    const TensorSpec query{type, {b, 1, sizes.query_heads * d}}, row{type, {b, 1, kv}};
    const TensorSpec past{sizes.codes, {b, sizes.kv_heads, sizes.capacity, d * sizes.bits / 8 / code_bytes}};
    const TensorSpec parameter{f32, {kv}}, table{f32, {sizes.table_rows, d / 2}};
    return {"QuantizedKVAttention",
            {query,
             row,
             row,
             past,
             past,
             {i32, {b}},
             {i32, {b, sizes.capacity, 3}},
             parameter,
             parameter,
             parameter,
             parameter,
             table,
             table},
            {query, past, past},
            {-1, 3, 4}};
}

Fields quantized_fields(const QuantizedSizes& sizes) {
    const auto pairs = static_cast<std::int32_t>(sizes.head_dim / 2);
    Fields fields;
    fields.add("num_heads", static_cast<std::int32_t>(sizes.query_heads));
    fields.add("kv_num_heads", static_cast<std::int32_t>(sizes.kv_heads));
    fields.add("bits", static_cast<std::int32_t>(sizes.bits));
    return fields.add_list("mrope_section", {pairs / 4, pairs / 4, pairs - pairs / 4 * 2});
}

OperatorSpec packable_spec(const PackableSizes& sizes, DataType type) {
    OperatorSpec spec = attention_spec(sizes.floats, type);
    const OperatorSpec codes = quantized_spec(sizes.codes, type);
    spec.name = "PackableKVAttention";
    const auto append = [&](std::size_t input) { spec.inputs.push_back(codes.inputs[input]); };
    append(3);
    append(4);
    for (std::size_t input = 6; input < codes.inputs.size(); ++input) append(input);
    spec.outputs.insert(spec.outputs.end(), codes.outputs.begin() + 1, codes.outputs.end());
    spec.aliases.insert(spec.aliases.end(), {7, 8});
    return spec;
}

nvinfer1::PluginTensorDesc describe(const TensorSpec& tensor) {
    nvinfer1::PluginTensorDesc desc{};
    desc.type = tensor.type;
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    desc.dims.nbDims = static_cast<std::int32_t>(tensor.shape.size());
    std::copy(tensor.shape.begin(), tensor.shape.end(), desc.dims.d);
    return desc;
}

std::vector<nvinfer1::PluginTensorDesc> describe(const std::vector<TensorSpec>& tensors) {
    std::vector<nvinfer1::PluginTensorDesc> descs;
    for (const TensorSpec& tensor : tensors) descs.push_back(describe(tensor));
    return descs;
}

std::vector<nvinfer1::DynamicPluginTensorDesc> describe_fixed(const std::vector<TensorSpec>& tensors) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> descs;
    for (const TensorSpec& tensor : tensors) {
        nvinfer1::DynamicPluginTensorDesc desc{};
        desc.desc = describe(tensor);
        desc.min = desc.opt = desc.max = desc.desc.dims;
        descs.push_back(desc);
    }
    return descs;
}

std::size_t element_bytes(DataType type) {
    switch (type) {
        case DataType::kINT8:
            return 1;
        case DataType::kHALF:
        case DataType::kBF16:
            return 2;
        case DataType::kINT64:
            return 8;
        default:
            return 4;
    }
}

std::size_t element_count(const TensorSpec& tensor) {
    std::size_t count = 1;
    for (const std::int64_t size : tensor.shape) count *= static_cast<std::size_t>(size);
    return count;
}

}  // namespace starkv::tests
