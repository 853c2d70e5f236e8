// SPDX-License-Identifier: Apache-2.0

#include "float_attention.h"

#include <algorithm>

#include "logging.h"
#include "starkv_kernels.h"

namespace starkv::trt {

namespace {

enum Input { kQ, kK, kV, kPastK, kPastV, kKvLen };

enum Output { kOut, kPresentK, kPresentV };

starkv_attention_shape shape_of(const AttentionHeads& heads, const Sizes& sizes,
                                nvinfer1::DataType cache_type) {
    starkv_attention_shape shape{};
    shape.sequences = sizes.get('B');
    shape.new_tokens = sizes.get('S');
    shape.query_heads = heads.query;
    shape.kv_heads = heads.kv;
    shape.head_dim = sizes.get('D');
    shape.capacity = sizes.get('C');
    shape.dtype = kernel_type(cache_type);
    return shape;
}

}  // namespace

bool check_heads(const char* operator_name, const AttentionHeads& heads) noexcept {
    if (heads.kv >= 1 && heads.query >= 1 && heads.query % heads.kv == 0) return true;
    report_error(operator_name,
                 "attributes num_heads and kv_num_heads must be given, and num_heads a multiple of "
                 "kv_num_heads; %d and %d are not",
                 heads.query, heads.kv);
    return false;
}

int float_attention_workspace(const AttentionHeads& heads, const Sizes& sizes, nvinfer1::DataType cache_type,
                              std::size_t* bytes) noexcept {
    const starkv_attention_shape shape = shape_of(heads, sizes, cache_type);
    return starkv_attention_workspace(&shape, bytes);
}

int most_float_attention_workspace(const AttentionHeads& heads, const Sizes& largest,
                                   nvinfer1::DataType cache_type, std::size_t* bytes) noexcept {
    // Not what the largest sizes need: a single token's attention is split among blocks, whose parts lie in
    // the workspace, but a prompt's is not; and the fewer sequences there are, the more each is split.
    *bytes = 0;
    starkv_attention_shape shape = shape_of(heads, largest, cache_type);
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

int launch_float_attention(const AttentionHeads& heads, const OperatorPlugin::Call& call) noexcept {
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
    const starkv_attention_shape shape = shape_of(heads, call.sizes, call.cache_type);
    return starkv_attention(&shape, &buffers, call.workspace, call.workspace_bytes, call.stream);
}

}  // namespace starkv::trt
