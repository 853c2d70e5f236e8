// SPDX-License-Identifier: Apache-2.0
// What the kernels of attention see: shapes, tensors, workspace.
#pragma once

#include "attention_parts.h"
#include "elements.h"
#include "starkv_kernels.h"

namespace starkv {

// Query heads that one block of decoding serves: as many as the tensor cores' product has rows.
constexpr int kDecodeHeads = 16;

struct AttentionView {
    starkv_attention_shape shape;
    starkv_attention_buffers buffers;

    int sharing;           // query heads of a KV head
    AttentionParts parts;  // of decoding

    // Elements before the rows of a KV head in the caches.
    __device__ size_t cache_offset(int sequence, int group) const {
        return (static_cast<size_t>(sequence) * shape.kv_heads + group) * shape.capacity * shape.head_dim;
    }
    // Elements before a new token's row of a KV head in k and v, and of a query head in q and out.
    __device__ size_t new_offset(int sequence, int token, int group) const {
        const size_t row = static_cast<size_t>(sequence) * shape.new_tokens + token;
        return (row * shape.kv_heads + group) * shape.head_dim;
    }
    __device__ size_t query_offset(int sequence, int token, int head) const {
        const size_t row = static_cast<size_t>(sequence) * shape.new_tokens + token;
        return (row * shape.query_heads + head) * shape.head_dim;
    }
};

// One sequence, its length checked: kernels index by it alone.
struct AttentionSequence {
    int index;
    int held;    // rows before the new ones
    bool valid;  // otherwise it is left alone and its output is 0

    __device__ AttentionSequence(const AttentionView& view, int index_) : index(index_) {
        held = view.buffers.kv_len[index];
        valid = held >= 0 && held <= view.shape.capacity - view.shape.new_tokens;
    }
};

}  // namespace starkv
