// SPDX-License-Identifier: Apache-2.0
// Attention of many new tokens, whose rows are in the cache by now: a block takes some queries of one head
// along all rows that they see, a tile at a time, with a softmax that runs along.
#pragma once

#include "async_copy.h"
#include "attention_prefill_tile.h"

namespace starkv {

// Starts to copy rows into shared memory; those from `count` on become 0. Eight threads take 128 bytes of a
// row, so that addresses differ by constants.
template <class T, int kDim, int kRows>
__device__ void copy_rows(T (&to)[kRows][kDim + 8], const T* from, size_t stride, int count) {
    constexpr int kVectors = kDim / 8, kTogether = 8, kRowsAtOnce = kAttentionThreads / kTogether;
    static_assert(kRows % kRowsAtOnce == 0, "every thread copies as often");
    const int thread = static_cast<int>(threadIdx.x);
    const int first_row = thread / kTogether, vector = thread % kTogether;
    T* own_to = &to[first_row][vector * 8];
    const T* own_from = from + first_row * stride + vector * 8;
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsAtOnce)
#pragma unroll
        for (int next = 0; next < kVectors; next += kTogether)
            if (next + kTogether <= kVectors || next + vector < kVectors)
                copy_async(own_to + row * (kDim + 8) + next * 8, own_from + row * stride + next * 8,
                           first_row + row < count);
}

// Stores the block's results, or 0 for a sequence that is left alone.
template <class T, int kDim>
__device__ void store_results(const PrefillShared<T, kDim>& shared, T* out, size_t stride, int count,
                              bool valid) {
    constexpr int kVectors = kDim / 8;
    constexpr int kOwn = PrefillShared<T, kDim>::kTiles * 16;
    for (int i = lane_index(); i < kOwn * kVectors; i += kWarp) {
        const int query = warp_index() * kOwn + i / kVectors, vector = i % kVectors;
        if (query >= count) return;
        const T* from = shared.queries[query];
        reinterpret_cast<uint4*>(out + query * stride)[vector] =
            valid ? reinterpret_cast<const uint4*>(from)[vector] : make_uint4(0, 0, 0, 0);
    }
}

// A number that is known when the kernel is compiled, in the place of one that is not.
template <size_t kValue>
struct Constant {
    __device__ operator size_t() const { return kValue; }
};

// The rows that a block's queries attend to, `stride` elements apart: a number, or a Constant.
template <class T, class Stride>
struct AttendedRows {
    const T* keys;
    const T* values;
    Stride stride;
    int count;  // of which the block's last query sees all
    int seen;   // by the warp's last query: 0 for a warp without queries
};

// Goes along the rows, whose queries are on their way to shared memory. hide(products, row) hides what
// queries do not see of the tile that begins with `row`.
template <class T, int kDim, class Stride, class Hide>
__device__ void attend_along(PrefillShared<T, kDim>& shared, const AttendedRows<T, Stride>& rows, Hide hide) {
    using State = PrefillState<T, kDim>;
    copy_rows<T, kDim>(shared.keys, rows.keys, rows.stride, rows.count);
    State state;
    for (int row = 0; row < rows.count; row += kPrefillRows) {
        // Keys are here, and nobody uses the last tile's values any more.
        wait_for_copies();
        __syncthreads();
        copy_rows<T, kDim>(shared.values, rows.values + static_cast<size_t>(row) * rows.stride, rows.stride,
                           rows.count - row);
        typename State::Products products;
        // Warps whose queries see nothing of the tile only help to copy.
        const bool takes_part = row < rows.seen;
        if (takes_part) {
            State::multiply_keys(shared, products);
            hide(products, row);
            state.weigh(products);
        }
        // Values are here, and nobody uses these keys any more.
        wait_for_copies();
        __syncthreads();
        const int next = row + kPrefillRows;
        if (next < rows.count)
            copy_rows<T, kDim>(shared.keys, rows.keys + static_cast<size_t>(next) * rows.stride, rows.stride,
                               rows.count - next);
        if (takes_part) state.multiply_values(shared, products);
    }
    state.finish(shared);
}

// Grid: query heads, blocks of queries, sequences. Blocks start in this order: those with the most rows
// first, and heads that share rows together.
template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2) prefill_attention(AttentionView view) {
    using Shared = PrefillShared<T, kDim>;
    using State = PrefillState<T, kDim>;
    auto& shared = shared_memory<Shared>();
    const AttentionSequence sequence(view, static_cast<int>(blockIdx.z));
    const int head = static_cast<int>(blockIdx.x), group = head / view.sharing;
    const int first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * Shared::kQueries;
    const int queries = min(Shared::kQueries, view.shape.new_tokens - first);
    const size_t query_offset = view.query_offset(sequence.index, first, head);
    const size_t query_stride = static_cast<size_t>(view.shape.query_heads) * kDim;
    T* out = static_cast<T*>(view.buffers.out) + query_offset;
    if (!sequence.valid) return store_results<T, kDim>(shared, out, query_stride, queries, false);

    const size_t cache = view.cache_offset(sequence.index, group);
    const T* keys = static_cast<const T*>(view.buffers.present_k) + cache;
    const T* values = static_cast<const T*>(view.buffers.present_v) + cache;
    // Rows that the block's first query sees, and all; rows that the warp's last query sees.
    const int seen_by_all = sequence.held + first + 1, rows = seen_by_all + queries - 1;
    const int warp_queries = min(queries, State::first_query() + State::kTiles * 16);
    const int warp_rows = warp_queries > State::first_query() ? sequence.held + first + warp_queries : 0;

    copy_rows<T, kDim>(shared.queries, static_cast<const T*>(view.buffers.q) + query_offset, query_stride,
                       queries);
    using Stride = Constant<kDim>;
    attend_along<T, kDim>(shared, AttendedRows<T, Stride>{keys, values, Stride(), rows, warp_rows},
                          [&](typename State::Products& products, int row) {
                              if (row + kPrefillRows > seen_by_all)
                                  State::mask(products, seen_by_all - 1 - row);
                          });
    store_results<T, kDim>(shared, out, query_stride, queries, true);
}

}  // namespace starkv
