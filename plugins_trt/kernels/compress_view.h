// SPDX-License-Identifier: Apache-2.0
// What the kernels of Compress see: shapes, tensors, workspace, and the numbers that the host planned.
#pragma once

#include "elements.h"
#include "starkv_kernels.h"

namespace starkv {

constexpr int kFrameNumbers = 5;
constexpr int kParameters = 23;
// Queries of one block of window scores; heads of a KV head are grouped up to it.
constexpr int kQueries = 64;
constexpr int kMostKvHeads = 64;
// Rows of one block of window scores, and of one block of the row-wise kernels.
constexpr int kScoreRows = 256;
constexpr int kRowsPerBlock = 1024;
constexpr int kMetaColumns = 4;
constexpr int kProtectedColumn = 2;

// A plan's numbers, in the order of StarKVPlan (starkv/methods/star_kv_plan.py).
struct Plan {
    float boost, boost_temperature;
    float mi_enabled, mi_weight, mi_tau, mi_decay, mi_chance, mi_scale, mi_stretch, mi_usable;
    float temporal_update, temporal_apply, temporal_delta, temporal_rho, temporal_eps, temporal_floor;
    float temporal_earlier, pattern_usable;
    float entropy_power, entropy_min, entropy_max, entropy_smooth, layer_budget;
};
static_assert(sizeof(Plan) == kParameters * sizeof(float), "one float for each parameter");

// Where the newest screenshot lies (starkv/methods/rows.py).
struct FrameNumbers {
    int index, rows_to_end, cells, grid_rows, grid_columns;
};
static_assert(sizeof(FrameNumbers) == kFrameNumbers * sizeof(int32_t), "as the tensor");

// Statistics of the screenshot's hidden norms: softmax of (norm - mean) / spread / temperature.
struct NormStatistics {
    float mean, spread, greatest, total;
};

// By which blocks of window scores share their work; all 0 before the launch.
struct ScoreCounters {
    int* next_task;
    int* chunks_done;  // [L*B, G, blocks]
    int* ready;        // [L*B, G, blocks]: 1 when query_statistics hold
};

struct CompressView {
    starkv_compress_shape shape;
    starkv_compress_buffers buffers;

    // Query heads of one block of scores, blocks of a KV head, chunks of rows.
    int heads_per_block, blocks_per_group, score_chunks, row_chunks;
    bool in_place;

    // Workspace.
    ScoreCounters counters;
    float2* partial_statistics;  // [L*B, G, blocks, chunks, kQueries]: largest score, sum of exponentials
    float2* query_statistics;    // [L*B, G, blocks, kQueries]: largest score, 1 / sum
    float* mass;                 // [L*B, G, blocks, C]: attention of the window
    float* groups;               // [L*B, G, C]: boosted scores of each KV head
    float* base;                 // [L*B, C]: their mean
    float* base_sums;            // [L*B, row chunks]
    NormStatistics* norms;       // [L*B]
    float* stability;            // [L*B, G]
    float* needed;               // [L*B]: rows that the scores are spread over
    uint32_t* keys;              // [L*B, C]: order of the scores, the best first
    int* competing;              // [L*B]: rows to keep beside the window
    int* source_rows;            // [L*B, E]

    __device__ int sharing() const { return shape.query_heads / shape.kv_heads; }
    __device__ const Plan& plan() const { return *reinterpret_cast<const Plan*>(buffers.parameters); }
    __device__ const FrameNumbers& frame() const { return *reinterpret_cast<const FrameNumbers*>(buffers.frame); }
    __device__ float* mass_rows(int sequence, int group) const {
        return mass + (static_cast<size_t>(sequence) * shape.kv_heads + group) * blocks_per_group * shape.capacity;
    }
    __device__ float* group_rows(int sequence, int group) const {
        return groups + (static_cast<size_t>(sequence) * shape.kv_heads + group) * shape.capacity;
    }
};

// One sequence in one layer, with everything that came from the device checked: kernels index by these alone.
struct Sequence {
    int index;   // layer * B + sequence
    bool valid;  // otherwise it is left alone
    int length;  // rows
    int past;    // rows that compete
    int start;   // first row of the newest screenshot
    int cells;   // its competing rows
    int slot;

    __device__ Sequence(const CompressView& view, int index_) : index(index_) {
        const auto& shape = view.shape;
        length = view.buffers.kv_len[index];
        past = length - shape.window;
        slot = view.buffers.slot[index % shape.sequences];
        const FrameNumbers& frame = view.frame();
        cells = frame.cells > 0 ? frame.cells : 0;
        start = cells ? length - frame.rows_to_end : 0;
        const int64_t most_kept = view.buffers.limits[2] < past ? view.buffers.limits[2] : past;
        valid = past >= 1 && length <= shape.capacity;
        valid = valid && slot >= 0 && slot < shape.slots && most_kept + shape.window <= shape.slot_capacity;
        valid = valid && start >= 0 && cells <= past - start && cells <= shape.pattern_capacity;
        valid = valid && (!cells || (frame.grid_rows > 0 && frame.grid_columns > 0));
        valid = valid && (!view.in_place || slot == index % shape.sequences);
    }
};

}  // namespace starkv
