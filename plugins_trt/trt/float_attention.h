// SPDX-License-Identifier: Apache-2.0
// Attention over a cache of floats: what KVAttention and PackableKVAttention have in common. Both have q, k,
// v, past_k, past_v and kv_len first among their inputs and out, present_k and present_v first among their
// outputs; of their sizes B are sequences, S new tokens, C rows of capacity and D the head dim.
#pragma once

#include "operator_plugin.h"

namespace starkv::trt {

struct AttentionHeads {
    std::int32_t query = 0;
    std::int32_t kv = 0;
};

// Reports and returns false unless there are some, and as many query heads for each KV head.
bool check_heads(const char* operator_name, const AttentionHeads& heads) noexcept;

// Each returns a starkv_status.
int float_attention_workspace(const AttentionHeads& heads, const Sizes& sizes, nvinfer1::DataType cache_type,
                              std::size_t* bytes) noexcept;
// The most that any sizes up to these need.
int most_float_attention_workspace(const AttentionHeads& heads, const Sizes& largest,
                                   nvinfer1::DataType cache_type, std::size_t* bytes) noexcept;
int launch_float_attention(const AttentionHeads& heads, const OperatorPlugin::Call& call) noexcept;

}  // namespace starkv::trt
