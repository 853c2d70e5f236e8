// SPDX-License-Identifier: Apache-2.0
// Attention of a prompt's last queries to the rows before them, summed over the window.
//
// Three kernels: the softmax's statistics of every query over chunks of rows, their merger, and the mass that
// each row gets. Scores themselves are worked out twice and never stored.
#pragma once

#include "block.h"
#include "key_tile.h"

namespace starkv {

constexpr int kScoreWarps = 4;
constexpr int kScoreThreads = kScoreWarps * kWarp;

// The queries of one block of heads of a KV head: heads_per_block * W of them, head after head.
struct QueryBlock {
    int sequence, group, first_head, count;

    __device__ QueryBlock(const CompressView& view, int block, int sequence_)
        : sequence(sequence_), group(block / view.blocks_per_group) {
        first_head = block % view.blocks_per_group * view.heads_per_block;
        const int heads = min(view.heads_per_block, view.sharing() - first_head);
        count = heads * view.shape.window;
    }
    // Where the statistics of its first query lie, in units of kQueries.
    __device__ size_t row(const CompressView& view) const {
        const int block = first_head / view.heads_per_block;
        const size_t group_index = static_cast<size_t>(sequence) * view.shape.kv_heads + group;
        return group_index * view.blocks_per_group + block;
    }
    template <class T>
    __device__ const T* queries(const CompressView& view) const {
        const size_t head = static_cast<size_t>(sequence) * view.shape.query_heads + group * view.sharing() + first_head;
        return static_cast<const T*>(view.buffers.q_window) + head * view.shape.window * view.shape.head_dim;
    }
    template <class T>
    __device__ const T* keys(const CompressView& view) const {
        const size_t head = static_cast<size_t>(sequence) * view.shape.kv_heads + group;
        return static_cast<const T*>(view.buffers.k) + head * view.shape.capacity * view.shape.head_dim;
    }
};

// Largest score and sum of exponentials below it, of some rows; joined with those of others.
struct SoftmaxSum {
    float greatest, sum;

    __device__ void add(float score_a, float score_b) {
        const float larger = fmaxf(greatest, fmaxf(score_a, score_b));
        // Nothing seen yet; but what is no number must not get lost.
        if (larger == -INFINITY && score_a == score_a && score_b == score_b) return;
        sum = sum * expf(greatest - larger) + expf(score_a - larger) + expf(score_b - larger);
        greatest = larger;
    }
    __device__ void join(SoftmaxSum other) {
        const float larger = fmaxf(greatest, other.greatest);
        if (larger == -INFINITY) {
            sum += other.sum;
            return;
        }
        sum = sum * expf(greatest - larger) + other.sum * expf(other.greatest - larger);
        greatest = larger;
    }
};

template <class T, int kDim>
struct ScoreShared {
    QueryRows<T, kDim> queries;
    SoftmaxSum sums[kScoreWarps][kQueries];
};

template <class T, int kDim>
__global__ void __launch_bounds__(kScoreThreads) window_statistics(CompressView view) {
    const Sequence sequence(view, static_cast<int>(blockIdx.z));
    const QueryBlock block(view, static_cast<int>(blockIdx.y), sequence.index);
    const int chunk = static_cast<int>(blockIdx.x), first = chunk * kScoreRows;
    if (!sequence.valid || first >= sequence.length) return;
    auto& shared = shared_memory<ScoreShared<T, kDim>>();
    shared.queries.load(block.queries<T>(view), block.count);
    __syncthreads();

    SoftmaxSum sums[kQueryTiles][2];
    for (auto& tile : sums) tile[0] = tile[1] = {-INFINITY, 0.0F};
    const T* keys = block.keys<T>(view);
    const int end = min(first + kScoreRows, sequence.length);
    KeyTile<T, kDim> tile;
    for (int row = first + warp_index() * kTileRows; row < end; row += kScoreWarps * kTileRows) {
        tile.load(keys, row, end);
        float scores[kQueryTiles][4];
        tile.scores(shared.queries, block.count, scores);
        const int upper = row + lane_index() / 4, lower = upper + 8;
        const bool all_visible = row + kTileRows <= min(end, sequence.past);
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n) {
            if (n * kTileQueries >= block.count) break;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float a = scores[n][c], b = scores[n][2 + c];
                if (!all_visible) {
                    const int query = n * kTileQueries + lane_index() % 4 * 2 + c;
                    const int last_seen = min(end - 1, sequence.past + query % view.shape.window);
                    if (upper > last_seen) a = -INFINITY;
                    if (lower > last_seen) b = -INFINITY;
                }
                sums[n][c].add(a, b);
            }
        }
    }
    for (int n = 0; n < kQueryTiles; ++n)
        for (int c = 0; c < 2; ++c) {
            SoftmaxSum sum = sums[n][c];
            for (int lanes = 4; lanes < kWarp; lanes *= 2)
                sum.join({shfl_xor(sum.greatest, lanes), shfl_xor(sum.sum, lanes)});
            if (lane_index() < 4) shared.sums[warp_index()][n * kTileQueries + lane_index() * 2 + c] = sum;
        }
    __syncthreads();
    const int query = static_cast<int>(threadIdx.x);
    if (query >= kQueries) return;
    SoftmaxSum sum = shared.sums[0][query];
    for (int warp = 1; warp < kScoreWarps; ++warp) sum.join(shared.sums[warp][query]);
    view.partial_statistics[(block.row(view) * view.score_chunks + chunk) * kQueries + query] =
        make_float2(sum.greatest, sum.sum);
}

// A block of kQueries threads for each block of queries.
__global__ void merge_statistics(CompressView view) {
    const Sequence sequence(view, static_cast<int>(blockIdx.y));
    if (!sequence.valid) return;
    const QueryBlock block(view, static_cast<int>(blockIdx.x), sequence.index);
    const int query = static_cast<int>(threadIdx.x);
    const float2* partial = view.partial_statistics + block.row(view) * view.score_chunks * kQueries + query;
    SoftmaxSum sum{-INFINITY, 0.0F};
    for (int chunk = 0; chunk < ceil_div(sequence.length, kScoreRows); ++chunk)
        sum.join({partial[chunk * kQueries].x, partial[chunk * kQueries].y});
    // Queries that only fill the block up get no weight.
    const bool real = query < block.count;
    view.query_statistics[block.row(view) * kQueries + query] =
        make_float2(real ? sum.greatest : 0.0F, real ? 1.0F / sum.sum : 0.0F);
}

template <class T, int kDim>
__global__ void __launch_bounds__(kScoreThreads) window_mass(CompressView view) {
    const Sequence sequence(view, static_cast<int>(blockIdx.z));
    const QueryBlock block(view, static_cast<int>(blockIdx.y), sequence.index);
    const int first = static_cast<int>(blockIdx.x) * kScoreRows;
    if (!sequence.valid || first >= sequence.past) return;
    auto& shared = shared_memory<ScoreShared<T, kDim>>();
    shared.queries.load(block.queries<T>(view), block.count);
    __syncthreads();

    const float2* statistics = view.query_statistics + block.row(view) * kQueries;
    float2 own[kQueryTiles][2];
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) own[n][c] = statistics[n * kTileQueries + lane_index() % 4 * 2 + c];

    const T* keys = block.keys<T>(view);
    float* mass = view.mass + block.row(view) * view.shape.capacity;
    const int end = min(first + kScoreRows, sequence.past);
    KeyTile<T, kDim> tile;
    for (int row = first + warp_index() * kTileRows; row < end; row += kScoreWarps * kTileRows) {
        tile.load(keys, row, end);
        float scores[kQueryTiles][4];
        tile.scores(shared.queries, block.count, scores);
        float upper = 0.0F, lower = 0.0F;
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n) {
            if (n * kTileQueries >= block.count) break;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                upper += expf(scores[n][c] - own[n][c].x) * own[n][c].y;
                lower += expf(scores[n][2 + c] - own[n][c].x) * own[n][c].y;
            }
        }
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            upper += shfl_xor(upper, lanes);
            lower += shfl_xor(lower, lanes);
        }
        const int upper_row = row + lane_index() / 4, lower_row = upper_row + 8;
        if (lane_index() % 4 == 0) {
            if (upper_row < end) mass[upper_row] = upper;
            if (lower_row < end) mass[lower_row] = lower;
        }
    }
}

}  // namespace starkv
