// SPDX-License-Identifier: Apache-2.0
// Attention of a prompt's last queries to the rows before them, summed over the window. Scores are worked out
// twice and never stored.
#pragma once

#include "compress_view.h"
#include "key_tile.h"
#include "score_tasks.h"
#include "softmax_sum.h"

namespace starkv {

constexpr int kQueryTiles = kQueries / kQueryTileRows;
constexpr int kScoreWarps = 4;
constexpr int kScoreThreads = kScoreWarps * kWarp;

// A unit's queries: those of heads_per_block heads of a KV head, W of each, head after head.
struct QueryBlock {
    int unit, sequence, group, first_head, count;

    __device__ QueryBlock(const CompressView& view, int unit_) : unit(unit_) {
        const int group_index = unit / view.blocks_per_group;
        sequence = group_index / view.shape.kv_heads;
        group = group_index % view.shape.kv_heads;
        first_head = unit % view.blocks_per_group * view.heads_per_block;
        count = min(view.heads_per_block, view.sharing() - first_head) * view.shape.window;
    }
    template <class T>
    __device__ const T* queries(const CompressView& view) const {
        const size_t head =
            static_cast<size_t>(sequence) * view.shape.query_heads + group * view.sharing() + first_head;
        return static_cast<const T*>(view.buffers.q_window) + head * view.shape.window * view.shape.head_dim;
    }
    template <class T>
    __device__ const T* keys(const CompressView& view) const {
        const size_t head = static_cast<size_t>(sequence) * view.shape.kv_heads + group;
        return static_cast<const T*>(view.buffers.k) + head * view.shape.capacity * view.shape.head_dim;
    }
    __device__ float2* partial_statistics(const CompressView& view, int chunk) const {
        return view.partial_statistics + (static_cast<size_t>(unit) * view.score_chunks + chunk) * kQueries;
    }
    __device__ float2* statistics(const CompressView& view) const {
        return view.query_statistics + static_cast<size_t>(unit) * kQueries;
    }
    __device__ float* mass(const CompressView& view) const {
        return view.mass + static_cast<size_t>(unit) * view.shape.capacity;
    }
};

template <class T, int kDim>
struct ScoreShared {
    QueryFragments<T, kDim, kQueryTiles> queries;
    SoftmaxSum sums[kScoreWarps][kQueries];
    int task;
    bool last;
};

// Of each query over the rows of a chunk; by all threads.
template <class T, int kDim>
__device__ void chunk_statistics(const CompressView& view, const Sequence& sequence, const QueryBlock& block,
                                 int chunk, ScoreShared<T, kDim>& shared) {
    SoftmaxSum sums[kQueryTiles][2];
#pragma unroll
    for (int m = 0; m < kQueryTiles; ++m) sums[m][0] = sums[m][1] = {-INFINITY, 0.0F};
    const T* keys = block.keys<T>(view);
    const float scale = score_scale(kDim);
    const int first = chunk * kScoreRows, end = min(first + kScoreRows, sequence.length);
    const int group = lane_index() / 4, thread = lane_index() % 4;
    // The last row stands for those behind it, which may hold anything.
    const auto key_of = [&](int row) { return keys + static_cast<size_t>(min(row, end - 1)) * kDim; };
    KeyTile<T, kDim> tile;
    for (int row = first + warp_index() * kTileRows; row < end; row += kScoreWarps * kTileRows) {
        tile.load(key_of, row);
        TileProducts<kQueryTiles> scores;
        tile.multiply(shared.queries, block.count, scores);
        const bool all_visible = row + kTileRows <= min(end, sequence.past);
#pragma unroll
        for (int m = 0; m < kQueryTiles; ++m) {
            if (m * kQueryTileRows >= block.count) break;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = m * kQueryTileRows + half * 8 + group;
                const int last_seen =
                    all_visible ? end : min(end - 1, sequence.past + query % view.shape.window);
                float own[kKeyTiles * 2];
#pragma unroll
                for (int i = 0; i < kKeyTiles * 2; ++i) {
                    const int key = row + i / 2 * 8 + thread * 2 + i % 2;
                    own[i] = key <= last_seen ? scores[m][i / 2][2 * half + i % 2] * scale : -INFINITY;
                }
                sums[m][half].add(own);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < kQueryTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            SoftmaxSum sum = sums[m][half];
            for (int lanes = 1; lanes < 4; lanes *= 2)
                sum.join({shfl_xor(sum.greatest, lanes), shfl_xor(sum.sum, lanes)});
            if (thread == 0) shared.sums[warp_index()][m * kQueryTileRows + half * 8 + group] = sum;
        }
    __syncthreads();
    const int query = static_cast<int>(threadIdx.x);
    if (query < kQueries) {
        SoftmaxSum sum = shared.sums[0][query];
        for (int warp = 1; warp < kScoreWarps; ++warp) sum.join(shared.sums[warp][query]);
        block.partial_statistics(view, chunk)[query] = make_float2(sum.greatest, sum.sum);
    }
}

// The block that finishes a unit's last chunk merges all of them.
template <class Shared>
__device__ void merge_if_last(const CompressView& view, const Sequence& sequence, const QueryBlock& block,
                              Shared& shared) {
    const int chunks = ceil_div(sequence.length, kScoreRows), thread = static_cast<int>(threadIdx.x);
    device_fence();
    __syncthreads();
    if (thread == 0) shared.last = atomic_add(view.counters.chunks_done + block.unit, 1) == chunks - 1;
    __syncthreads();
    if (!shared.last) return;
    device_fence();
    if (thread < kQueries) {
        SoftmaxSum sum{-INFINITY, 0.0F};
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const float2 partial = load_published(block.partial_statistics(view, chunk) + thread);
            sum.join({partial.x, partial.y});
        }
        // Queries that only fill the block up get no weight.
        const bool real = thread < block.count;
        block.statistics(view)[thread] =
            make_float2(real ? sum.greatest : 0.0F, real ? 1.0F / sum.sum : 0.0F);
    }
    device_fence();
    __syncthreads();
    if (thread == 0) atomic_add(view.counters.ready + block.unit, 1);
}

// What each row of a chunk gets from all queries of the unit.
template <class T, int kDim>
__device__ void chunk_mass(const CompressView& view, const Sequence& sequence, const QueryBlock& block,
                           int chunk, ScoreShared<T, kDim>& shared) {
    const int group = lane_index() / 4, thread = lane_index() % 4;
    float2 own[kQueryTiles][2];
#pragma unroll
    for (int m = 0; m < kQueryTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            own[m][half] = load_published(block.statistics(view) + m * kQueryTileRows + half * 8 + group);
    const T* keys = block.keys<T>(view);
    const float scale = score_scale(kDim);
    float* mass = block.mass(view);
    const int first = chunk * kScoreRows, end = min(first + kScoreRows, sequence.past);
    // The last row stands for those behind it, which may hold anything.
    const auto key_of = [&](int row) { return keys + static_cast<size_t>(min(row, end - 1)) * kDim; };
    KeyTile<T, kDim> tile;
    for (int row = first + warp_index() * kTileRows; row < end; row += kScoreWarps * kTileRows) {
        tile.load(key_of, row);
        TileProducts<kQueryTiles> scores;
        tile.multiply(shared.queries, block.count, scores);
        float sums[kKeyTiles * 2] = {};
#pragma unroll
        for (int m = 0; m < kQueryTiles; ++m) {
            if (m * kQueryTileRows >= block.count) break;
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < kKeyTiles * 2; ++i) {
                    const float score = scores[m][i / 2][2 * half + i % 2] * scale;
                    sums[i] += power_of_two(score - own[m][half].x) * own[m][half].y;
                }
        }
#pragma unroll
        for (int i = 0; i < kKeyTiles * 2; ++i) {
            for (int lanes = 4; lanes < kWarp; lanes *= 2) sums[i] += shfl_xor(sums[i], lanes);
            const int key = row + i / 2 * 8 + thread * 2 + i % 2;
            if (group == 0 && key < end) mass[key] = sums[i];
        }
    }
}

// A block for each task: 2 * units * score_chunks.
template <class T, int kDim>
__global__ void __launch_bounds__(kScoreThreads) window_scores(CompressView view) {
    auto& shared = shared_memory<ScoreShared<T, kDim>>();
    if (threadIdx.x == 0) shared.task = atomic_add(view.counters.next_task, 1);
    __syncthreads();
    const int units = view.shape.layers * view.shape.sequences * view.shape.kv_heads * view.blocks_per_group;
    const ScoreTask task = score_task(shared.task, units, view.score_chunks);
    const QueryBlock block(view, task.unit);
    const Sequence sequence(view, block.sequence);
    const int first = task.chunk * kScoreRows;
    if (!sequence.valid || first >= (task.statistics ? sequence.length : sequence.past)) return;
    shared.queries.load(block.queries<T>(view), block.count);
    if (!task.statistics && threadIdx.x == 0) wait_until_set(view.counters.ready + task.unit);
    __syncthreads();
    if (task.statistics) {
        chunk_statistics(view, sequence, block, task.chunk, shared);
        merge_if_last(view, sequence, block, shared);
    } else {
        chunk_mass(view, sequence, block, task.chunk, shared);
    }
}

}  // namespace starkv
