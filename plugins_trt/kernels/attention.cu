// SPDX-License-Identifier: Apache-2.0
// starkv_attention: checks, workspace, and the order of the kernels.

#include "attention_append.cuh"
#include "attention_decode.cuh"
#include "attention_merge.cuh"
#include "attention_prefill.cuh"
#include "host.h"

namespace starkv {
namespace {

constexpr int kMostKvHeads = 64;
constexpr int kMostRows = 1 << 24;
constexpr int kMostNewTokens = 1 << 21;
// Limit of a grid's second and third dimension.
constexpr int kMostGrid = 65535;

int check_shape(const starkv_attention_shape& shape) {
    if (shape.dtype != STARKV_FLOAT16 && shape.dtype != STARKV_BFLOAT16) return STARKV_ERROR_DTYPE;
    if (!supported_head_dim(shape.head_dim)) return STARKV_ERROR_HEAD_DIM;
    if (shape.kv_heads < 1 || shape.kv_heads > kMostKvHeads || shape.query_heads < 1 ||
        shape.query_heads > kMostGrid || shape.query_heads % shape.kv_heads)
        return STARKV_ERROR_HEADS;
    if (shape.sequences < 1 || shape.sequences > kMostGrid / shape.kv_heads || shape.new_tokens < 1 ||
        shape.capacity < 1 || shape.capacity > kMostRows || shape.new_tokens > kMostNewTokens)
        return STARKV_ERROR_SHAPE;
    // Threads that append rows are counted by an int.
    const int64_t appended = static_cast<int64_t>(shape.new_tokens) * shape.kv_heads * shape.head_dim / 8;
    return appended < INT32_MAX - kAppendThreads ? STARKV_OK : STARKV_ERROR_SHAPE;
}

AttentionView lay_out(const starkv_attention_shape& shape, Workspace& workspace) {
    AttentionView view{};
    view.shape = shape;
    view.sharing = shape.query_heads / shape.kv_heads;
    if (shape.new_tokens > 1) return view;
    const int blocks = shape.sequences * shape.kv_heads * ceil_div(view.sharing, kDecodeHeads);
    view.parts = AttentionParts::lay_out(blocks, shape.sequences * shape.query_heads, shape.head_dim,
                                         shape.capacity, workspace);
    return view;
}

int check_buffers(const starkv_attention_shape& shape, const starkv_attention_buffers& buffers) {
    const std::initializer_list<const void*> all = {buffers.q,         buffers.k,         buffers.v,
                                                    buffers.past_k,    buffers.past_v,    buffers.kv_len,
                                                    buffers.present_k, buffers.present_v, buffers.out};
    if (any_null(all)) return STARKV_ERROR_NULL_POINTER;
    if (any_misaligned(all)) return STARKV_ERROR_MISALIGNED;
    const size_t tokens = static_cast<size_t>(shape.sequences) * shape.new_tokens * shape.head_dim * 2;
    const size_t query_bytes = tokens * shape.query_heads, new_bytes = tokens * shape.kv_heads;
    const size_t heads = static_cast<size_t>(shape.sequences) * shape.kv_heads;
    const size_t cache_bytes = heads * shape.capacity * shape.head_dim * 2;
    const Part read[] = {{buffers.q, query_bytes},      {buffers.k, new_bytes},
                         {buffers.v, new_bytes},        {buffers.past_k, cache_bytes},
                         {buffers.past_v, cache_bytes}, {buffers.kv_len, shape.sequences * sizeof(int32_t)}};
    const Part written[] = {
        {buffers.present_k, cache_bytes}, {buffers.present_v, cache_bytes}, {buffers.out, query_bytes}};
    const bool overlapping = any_overlap(
        read, written, {{buffers.past_k, buffers.present_k}, {buffers.past_v, buffers.present_v}});
    return overlapping ? STARKV_ERROR_OVERLAP : STARKV_OK;
}

bool copy_caches(const AttentionView& view, Stream stream) {
    const auto& shape = view.shape;
    const auto& buffers = view.buffers;
    const size_t heads = static_cast<size_t>(shape.sequences) * shape.kv_heads;
    const size_t bytes = heads * shape.capacity * shape.head_dim * 2;
    return (buffers.present_k == buffers.past_k ||
            copy_on_device(buffers.present_k, buffers.past_k, bytes, stream)) &&
           (buffers.present_v == buffers.past_v ||
            copy_on_device(buffers.present_v, buffers.past_v, bytes, stream));
}

template <class T, int kDim>
bool decode(const AttentionView& view, Stream stream) {
    const auto& shape = view.shape;
    const auto sequences = static_cast<unsigned>(shape.sequences);
    const dim3 parts(static_cast<unsigned>(view.parts.splits),
                     static_cast<unsigned>(ceil_div(view.sharing, kDecodeHeads)),
                     static_cast<unsigned>(shape.kv_heads) * sequences);
    const dim3 heads(static_cast<unsigned>(shape.query_heads), sequences);
    return launch(decode_attention<T, kDim>, parts, kAttentionThreads, sizeof(DecodeShared<T, kDim>), stream,
                  view) &&
           launch(merge_attention<T, kDim>, heads, kMergeThreads, sizeof(MergeShared<kDim>), stream, view);
}

template <class T, int kDim>
bool prefill(const AttentionView& view, Stream stream) {
    using Shared = PrefillShared<T, kDim>;
    const auto& shape = view.shape;
    const auto sequences = static_cast<unsigned>(shape.sequences);
    const int vectors = shape.new_tokens * shape.kv_heads * (kDim / 8);
    const dim3 appended(static_cast<unsigned>(ceil_div(vectors, kAppendThreads)), 2, sequences);
    const dim3 blocks(static_cast<unsigned>(shape.query_heads),
                      static_cast<unsigned>(ceil_div(shape.new_tokens, Shared::kQueries)), sequences);
    return launch(append_rows, appended, kAppendThreads, 0, stream, view) &&
           launch(prefill_attention<T, kDim>, blocks, kAttentionThreads, sizeof(Shared), stream, view);
}

template <class T, int kDim>
bool attend(const AttentionView& view, Stream stream) {
    return copy_caches(view, stream) &&
           (view.shape.new_tokens == 1 ? decode<T, kDim>(view, stream) : prefill<T, kDim>(view, stream));
}

template <class T>
bool attend(const AttentionView& view, Stream stream) {
    switch (view.shape.head_dim) {
        case 64:
            return attend<T, 64>(view, stream);
        case 80:
            return attend<T, 80>(view, stream);
        case 96:
            return attend<T, 96>(view, stream);
        case 128:
            return attend<T, 128>(view, stream);
        default:
            return attend<T, 256>(view, stream);
    }
}

}  // namespace
}  // namespace starkv

int starkv_attention_workspace(const starkv_attention_shape* shape, size_t* bytes) {
    if (!shape || !bytes) return STARKV_ERROR_NULL_POINTER;
    const int status = starkv::check_shape(*shape);
    if (status != STARKV_OK) return status;
    starkv::Workspace workspace(nullptr);
    starkv::lay_out(*shape, workspace);
    *bytes = workspace.bytes();
    return STARKV_OK;
}

int starkv_attention(const starkv_attention_shape* shape, const starkv_attention_buffers* buffers,
                     void* workspace, size_t workspace_bytes, void* stream) {
    if (!shape || !buffers) return STARKV_ERROR_NULL_POINTER;
    int status = starkv::check_shape(*shape);
    if (status == STARKV_OK) status = starkv::check_buffers(*shape, *buffers);
    if (status != STARKV_OK) return status;
    starkv::Workspace parts(workspace);
    starkv::AttentionView view = starkv::lay_out(*shape, parts);
    if (parts.bytes() && !workspace) return STARKV_ERROR_NULL_POINTER;
    if (starkv::any_misaligned({workspace})) return STARKV_ERROR_MISALIGNED;
    if (parts.bytes() > workspace_bytes) return STARKV_ERROR_WORKSPACE;
    view.buffers = *buffers;
    const auto on = static_cast<starkv::Stream>(stream);
    const bool launched = shape->dtype == STARKV_FLOAT16 ? starkv::attend<starkv::Half>(view, on)
                                                         : starkv::attend<starkv::BFloat16>(view, on);
    return launched ? STARKV_OK : STARKV_ERROR_LAUNCH;
}
