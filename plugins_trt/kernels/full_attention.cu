// SPDX-License-Identifier: Apache-2.0
// starkv_full_attention: every token of a sequence attends to every other, as in a vision tower. Nothing of
// the size of tokens * tokens is ever stored.

#include "attention_prefill.cuh"
#include "host.h"

namespace starkv {
namespace {

// Limit of a grid's second and third dimension.
constexpr int kMostGrid = 65535;
constexpr int kMostTokens = 1 << 21;

struct FullAttentionView {
    starkv_full_attention_shape shape;
    const void* q;
    const void* k;
    const void* v;
    void* out;
};

// Grid: blocks of queries, heads, sequences. Heads one after the other: the blocks that run at once share the
// rows of few heads.
template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2) full_attention(FullAttentionView view) {
    using Shared = PrefillShared<T, kDim>;
    using State = PrefillState<T, kDim>;
    auto& shared = shared_memory<Shared>();
    const int tokens = view.shape.tokens;
    const int first = static_cast<int>(blockIdx.x) * Shared::kQueries;
    const int queries = min(Shared::kQueries, tokens - first);
    const size_t stride = static_cast<size_t>(view.shape.heads) * kDim;
    const size_t sequence = static_cast<size_t>(blockIdx.z) * tokens * stride;
    const size_t head = sequence + static_cast<size_t>(blockIdx.y) * kDim;
    const size_t own = head + static_cast<size_t>(first) * stride;
    copy_rows<T, kDim>(shared.queries, static_cast<const T*>(view.q) + own, stride, queries);
    const AttendedRows<T, size_t> rows{static_cast<const T*>(view.k) + head,
                                       static_cast<const T*>(view.v) + head, stride, tokens,
                                       State::first_query() < queries ? tokens : 0};
    attend_along<T, kDim>(shared, rows, [&](typename State::Products& products, int row) {
        if (row + kPrefillRows > tokens) State::hide_from(products, tokens - row);
    });
    store_results<T, kDim>(shared, static_cast<T*>(view.out) + own, stride, queries, true);
}

template <class T, int kDim>
bool attend(const FullAttentionView& view, Stream stream) {
    using Shared = PrefillShared<T, kDim>;
    const dim3 blocks(static_cast<unsigned>(ceil_div(view.shape.tokens, Shared::kQueries)),
                      static_cast<unsigned>(view.shape.heads), static_cast<unsigned>(view.shape.sequences));
    return launch(full_attention<T, kDim>, blocks, kAttentionThreads, sizeof(Shared), stream, view);
}

template <class T>
bool attend(const FullAttentionView& view, Stream stream) {
    switch (view.shape.head_dim) {
        case 32:
            return attend<T, 32>(view, stream);
        case 64:
            return attend<T, 64>(view, stream);
        case 80:
            return attend<T, 80>(view, stream);
        case 96:
            return attend<T, 96>(view, stream);
        default:
            return attend<T, 128>(view, stream);
    }
}

int check_shape(const starkv_full_attention_shape& shape) {
    if (shape.dtype != STARKV_FLOAT16 && shape.dtype != STARKV_BFLOAT16) return STARKV_ERROR_DTYPE;
    const bool narrow = shape.head_dim == 32 || (supported_head_dim(shape.head_dim) && shape.head_dim <= 128);
    if (!narrow) return STARKV_ERROR_HEAD_DIM;
    if (shape.heads < 1 || shape.heads > kMostGrid) return STARKV_ERROR_HEADS;
    const bool fits = shape.sequences >= 1 && shape.sequences <= kMostGrid && shape.tokens >= 1 &&
                      shape.tokens <= kMostTokens;
    return fits ? STARKV_OK : STARKV_ERROR_SHAPE;
}

}  // namespace
}  // namespace starkv

int starkv_full_attention_workspace(const starkv_full_attention_shape* shape, size_t* bytes) {
    if (!shape || !bytes) return STARKV_ERROR_NULL_POINTER;
    *bytes = 0;
    return starkv::check_shape(*shape);
}

int starkv_full_attention(const starkv_full_attention_shape* shape, const void* q, const void* k,
                          const void* v, void* out, void* stream) {
    if (!shape || starkv::any_null({q, k, v, out})) return STARKV_ERROR_NULL_POINTER;
    const int status = starkv::check_shape(*shape);
    if (status != STARKV_OK) return status;
    if (starkv::any_misaligned({q, k, v, out})) return STARKV_ERROR_MISALIGNED;
    const size_t bytes =
        static_cast<size_t>(shape->sequences) * shape->tokens * shape->heads * shape->head_dim * 2;
    for (const void* from : {q, k, v})
        if (starkv::overlap(from, bytes, out, bytes)) return STARKV_ERROR_OVERLAP;
    const starkv::FullAttentionView view{*shape, q, k, v, out};
    const auto on = static_cast<starkv::Stream>(stream);
    const bool launched = shape->dtype == STARKV_FLOAT16 ? starkv::attend<starkv::Half>(view, on)
                                                         : starkv::attend<starkv::BFloat16>(view, on);
    return launched ? STARKV_OK : STARKV_ERROR_LAUNCH;
}
