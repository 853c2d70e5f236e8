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
    int* chunks_done;  // of each unit
    int* ready;        // of each unit: 1 when query_statistics hold
};

struct CompressView {
    starkv_compress_shape shape;
    starkv_compress_buffers buffers;

    // Query heads of one block of scores, blocks of a KV head, chunks of rows.
    int heads_per_block, blocks_per_group, score_chunks, row_chunks;
    bool in_place;

    // Workspace.
    int* accepted;  // [B]: 1 where a sequence can be compressed in all layers
    ScoreCounters counters;
    float2* partial_statistics;  // [L*B, G, blocks, chunks, kQueries]: largest score, sum of exponentials
    float2* query_statistics;    // [L*B, G, blocks, kQueries]: largest score, 1 / sum
    float* mass;                 // [L*B, G, blocks, C]: attention of the window
    float* groups;               // [L*B, G, C]: boosted scores of each KV head
    float* base;                 // [L*B, C]: their mean
    float* base_sums;            // [L*B, row chunks]
    NormStatistics* norms;       // [L*B]
    float* stability;            // [L*B, G]
    float* entropy;              // [L*B]: of the scores, 1 where all are equal
    float* needed;               // [L*B]: rows that the scores are spread over
    uint32_t* keys;              // [L*B, C]: order of the scores, the best first
    int* competing;              // [L*B]: rows to keep beside the window
    int* source_rows;            // [L*B, E]

    __device__ int sharing() const { return shape.query_heads / shape.kv_heads; }
    __device__ const Plan& plan() const { return *reinterpret_cast<const Plan*>(buffers.parameters); }
    __device__ const FrameNumbers& frame() const {
        return *reinterpret_cast<const FrameNumbers*>(buffers.frame);
    }
    __device__ float* mass_rows(int sequence, int group) const {
        return mass +
               (static_cast<size_t>(sequence) * shape.kv_heads + group) * blocks_per_group * shape.capacity;
    }
    __device__ float* group_rows(int sequence, int group) const {
        return groups + (static_cast<size_t>(sequence) * shape.kv_heads + group) * shape.capacity;
    }
};

// One sequence in one layer. Numbers that came from the device are used only where the sequence is accepted.
struct Sequence {
    int index;   // layer * B + sequence
    bool valid;  // otherwise it is left alone, in all layers
    int length;  // rows
    int past;    // rows that compete
    int start;   // first row of the newest screenshot
    int cells;   // its competing rows
    int slot;

    __device__ Sequence(const CompressView& view, int index_)
        : Sequence(view, index_, view.accepted[index_ % view.shape.sequences] != 0) {}

    __device__ Sequence(const CompressView& view, int index_, bool accepted)
        : index(index_), valid(accepted) {
        const int sequence = index % view.shape.sequences;
        length = view.buffers.kv_len[index];
        past = length - view.shape.window;
        slot = view.buffers.slot[sequence];
        cells = max(view.frame().cells, 0);
        start = cells ? length - view.frame().rows_to_end : 0;
    }

    // Whether everything lies where it should.
    __device__ bool is_sound(const CompressView& view) const {
        const auto& shape = view.shape;
        const FrameNumbers& frame = view.frame();
        const bool rows = past >= 1 && length <= shape.capacity;
        const bool inside =
            start >= 0 && start <= past && cells <= past - start && cells <= shape.pattern_capacity;
        const bool grid = !cells || (frame.grid_rows > 0 && frame.grid_columns > 0);
        const bool own_slot = !view.in_place || slot == index % shape.sequences;
        return rows && inside && grid && own_slot && slot >= 0 && slot < shape.slots;
    }
};

}  // namespace starkv
