// SPDX-License-Identifier: Apache-2.0
// Appends many new rows to the caches.
#pragma once

#include "attention_view.h"

namespace starkv {

constexpr int kAppendThreads = 256;

// Grid: vectors of 16 bytes of a sequence's new rows, keys and values, sequences.
__global__ void append_rows(AttentionView view) {
    const AttentionSequence sequence(view, static_cast<int>(blockIdx.z));
    const auto& shape = view.shape;
    const int vectors = shape.head_dim / 8;
    const int i = static_cast<int>(blockIdx.x) * kAppendThreads + static_cast<int>(threadIdx.x);
    const int vector = i % vectors, group = i / vectors % shape.kv_heads;
    const int token = i / vectors / shape.kv_heads;
    if (!sequence.valid || token >= shape.new_tokens) return;
    const bool is_key = blockIdx.y == 0;
    const size_t from = view.new_offset(sequence.index, token, group) / 8 + vector;
    const size_t row = static_cast<size_t>(sequence.held + token) * vectors;
    const size_t to = view.cache_offset(sequence.index, group) / 8 + row + vector;
    const auto* source = static_cast<const uint4*>(is_key ? view.buffers.k : view.buffers.v);
    static_cast<uint4*>(is_key ? view.buffers.present_k : view.buffers.present_v)[to] = source[from];
}

}  // namespace starkv
