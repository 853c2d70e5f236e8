// SPDX-License-Identifier: Apache-2.0
// The operators' tensors, written down from their ONNX definitions rather than taken from the plugins.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "fields.h"

namespace starkv::tests {

using Shape = std::vector<std::int64_t>;

struct TensorSpec {
    nvinfer1::DataType type;
    Shape shape;
};

struct OperatorSpec {
    std::string name;
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
    std::vector<int> aliases;  // per output: the input whose memory it shares, or -1
};

struct CompressSizes {
    std::int64_t layers = 2, sequences = 2, kv_heads = 2, query_heads = 4, window = 4, head_dim = 64;
    std::int64_t capacity = 48, slots = 3, slot_capacity = 16, pattern = 8;
};

struct AttentionSizes {
    std::int64_t sequences = 3, new_tokens = 3, query_heads = 4, kv_heads = 2, head_dim = 64, capacity = 16;
    std::int64_t past_extent = 0;
    nvinfer1::DataType past_extent_type = nvinfer1::DataType::kINT8;
};

struct FullAttentionSizes {
    std::int64_t sequences = 2, tokens = 5, heads = 2, head_dim = 64;
};

struct QuantizedSizes {
    std::int64_t sequences = 3, query_heads = 4, kv_heads = 2, head_dim = 64, capacity = 16, table_rows = 40;
    std::int64_t bits = 8;
    // kINT8, or kINT32 for words of four bytes.
    nvinfer1::DataType codes = nvinfer1::DataType::kINT8;
};

// Of PackableKVAttention: floats with the sizes of KVAttention, and codes with those of QuantizedKVAttention,
// whose capacity says which of them a call works on. What both have comes from the former.
struct PackableSizes {
    AttentionSizes floats;
    QuantizedSizes codes;
};

OperatorSpec compress_spec(const CompressSizes& sizes, nvinfer1::DataType cache_type);
OperatorSpec attention_spec(const AttentionSizes& sizes, nvinfer1::DataType cache_type);
Fields attention_fields(const AttentionSizes& sizes);
OperatorSpec full_attention_spec(const FullAttentionSizes& sizes, nvinfer1::DataType cache_type);
Fields full_attention_fields(const FullAttentionSizes& sizes);
OperatorSpec quantized_spec(const QuantizedSizes& sizes, nvinfer1::DataType cache_type);
Fields quantized_fields(const QuantizedSizes& sizes);
// Has the attributes of QuantizedKVAttention.
OperatorSpec packable_spec(const PackableSizes& sizes, nvinfer1::DataType cache_type);

nvinfer1::PluginTensorDesc describe(const TensorSpec& tensor);
std::vector<nvinfer1::PluginTensorDesc> describe(const std::vector<TensorSpec>& tensors);
// As for an optimization profile that has one size only.
std::vector<nvinfer1::DynamicPluginTensorDesc> describe_fixed(const std::vector<TensorSpec>& tensors);

std::size_t element_bytes(nvinfer1::DataType type);
std::size_t element_count(const TensorSpec& tensor);

}  // namespace starkv::tests
