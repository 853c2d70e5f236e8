// SPDX-License-Identifier: Apache-2.0
// starkv_compress: checks, workspace, and the order of the kernels.

#include "compact_rows.cuh"
#include "compress_view.h"
#include "final_scores.cuh"
#include "group_memory.cuh"
#include "group_scores.cuh"
#include "host.h"
#include "layer_budgets.cuh"
#include "prepare.cuh"
#include "select_rows.cuh"
#include "window_scores.cuh"

namespace starkv {
namespace {

constexpr int kMostWindow = 64;
constexpr int kMostPoolingKernel = 63;
constexpr int kMostLayers = 4096;
// Limits of a grid's second and third dimension.
constexpr int64_t kMostGrid = 65535;

int check_shape(const starkv_compress_shape& shape) {
    const auto positive = [](std::initializer_list<int32_t> sizes) {
        for (const int32_t size : sizes)
            if (size < 1) return false;
        return true;
    };
    if (shape.dtype < STARKV_FLOAT32 || shape.dtype > STARKV_BFLOAT16) return STARKV_ERROR_DTYPE;
    if (!supported_head_dim(shape.head_dim)) return STARKV_ERROR_HEAD_DIM;
    if (shape.window < 1 || shape.window > kMostWindow) return STARKV_ERROR_WINDOW;
    if (shape.kv_heads < 1 || shape.kv_heads > kMostKvHeads || shape.query_heads < 1 ||
        shape.query_heads % shape.kv_heads)
        return STARKV_ERROR_HEADS;
    if ((shape.pooling != STARKV_AVGPOOL && shape.pooling != STARKV_MAXPOOL) || shape.pooling_kernel < 1 ||
        shape.pooling_kernel > kMostPoolingKernel || shape.pooling_kernel % 2 == 0)
        return STARKV_ERROR_POOLING;
    if (!positive({shape.layers, shape.sequences, shape.capacity, shape.slots, shape.slot_capacity,
                   shape.pattern_capacity}))
        return STARKV_ERROR_SHAPE;
    if (shape.capacity > 1 << kRowBits || shape.slot_capacity > 1 << kRowBits || shape.layers > kMostLayers ||
        static_cast<int64_t>(shape.layers) * shape.sequences > kMostGrid)
        return STARKV_ERROR_SHAPE;
    return STARKV_OK;
}

CompressView lay_out(const starkv_compress_shape& shape, Workspace& workspace) {
    CompressView view{};
    view.shape = shape;
    const int sharing = shape.query_heads / shape.kv_heads;
    // Maxima are taken of single heads; sums of as many heads as fit a block of queries.
    view.heads_per_block = shape.pooling == STARKV_MAXPOOL ? 1 : std::min(sharing, kQueries / shape.window);
    view.blocks_per_group = ceil_div(sharing, view.heads_per_block);
    view.score_chunks = ceil_div(shape.capacity, kScoreRows);
    view.row_chunks = ceil_div(shape.capacity, kRowsPerBlock);
    const size_t sequences = static_cast<size_t>(shape.layers) * shape.sequences;
    const size_t heads = sequences * shape.kv_heads, blocks = heads * view.blocks_per_group;
    view.accepted = workspace.take<int>(shape.sequences);
    view.counters.next_task = workspace.take<int>(1 + 2 * blocks);
    view.counters.chunks_done = view.counters.next_task + 1;
    view.counters.ready = view.counters.chunks_done + blocks;
    view.partial_statistics = workspace.take<float2>(blocks * view.score_chunks * kQueries);
    view.query_statistics = workspace.take<float2>(blocks * kQueries);
    view.mass = workspace.take<float>(blocks * shape.capacity);
    view.groups = workspace.take<float>(heads * shape.capacity);
    view.base = workspace.take<float>(sequences * shape.capacity);
    view.base_sums = workspace.take<float>(sequences * view.row_chunks);
    view.norms = workspace.take<NormStatistics>(sequences);
    view.stability = workspace.take<float>(heads);
    view.entropy = workspace.take<float>(sequences);
    view.needed = workspace.take<float>(sequences);
    view.keys = workspace.take<uint32_t>(sequences * shape.capacity);
    view.competing = workspace.take<int>(sequences);
    view.source_rows = workspace.take<int>(sequences * shape.slot_capacity);
    return view;
}

int check_buffers(const starkv_compress_shape& shape, const starkv_compress_buffers& buffers) {
    const auto required = {buffers.k,
                           buffers.v,
                           buffers.q_window,
                           static_cast<const void*>(buffers.hidden_norm),
                           static_cast<const void*>(buffers.kv_len),
                           static_cast<const void*>(buffers.row_meta),
                           static_cast<const void*>(buffers.frame),
                           static_cast<const void*>(buffers.parameters),
                           static_cast<const void*>(buffers.limits),
                           static_cast<const void*>(buffers.mi_ema),
                           static_cast<const void*>(buffers.pattern_ema),
                           static_cast<const void*>(buffers.temperature),
                           static_cast<const void*>(buffers.slot),
                           static_cast<const void*>(buffers.dst_k),
                           static_cast<const void*>(buffers.dst_v),
                           static_cast<const void*>(buffers.dst_meta),
                           static_cast<const void*>(buffers.new_len),
                           static_cast<const void*>(buffers.new_mi_ema),
                           static_cast<const void*>(buffers.new_pattern_ema),
                           static_cast<const void*>(buffers.new_temperature)};
    if (any_null(required)) return STARKV_ERROR_NULL_POINTER;
    if (any_misaligned(required) || any_misaligned({buffers.rows, buffers.scores, buffers.stages}))
        return STARKV_ERROR_MISALIGNED;
    const size_t row_bytes = shape.kv_heads * shape.head_dim * element_bytes(shape.dtype);
    const size_t meta_bytes = kMetaColumns * sizeof(int32_t);
    const size_t source_rows = static_cast<size_t>(shape.layers) * shape.sequences * shape.capacity;
    const size_t slot_rows = static_cast<size_t>(shape.layers) * shape.slots * shape.slot_capacity;
    const bool same_k = buffers.k == buffers.dst_k, same_v = buffers.v == buffers.dst_v;
    const bool same_meta = buffers.row_meta == buffers.dst_meta;
    if (same_k && same_v && same_meta)
        return shape.slots == shape.sequences && shape.slot_capacity == shape.capacity ? STARKV_OK
                                                                                       : STARKV_ERROR_SHAPE;
    const void* sources[] = {buffers.k, buffers.v, buffers.row_meta};
    const void* destinations[] = {buffers.dst_k, buffers.dst_v, buffers.dst_meta};
    const size_t bytes[] = {row_bytes, row_bytes, meta_bytes};
    for (int from = 0; from < 3; ++from)
        for (int to = 0; to < 3; ++to)
            if (overlap(sources[from], source_rows * bytes[from], destinations[to], slot_rows * bytes[to]))
                return STARKV_ERROR_OVERLAP;
    return STARKV_OK;
}

int64_t score_units(const CompressView& view) {
    return static_cast<int64_t>(view.shape.layers) * view.shape.sequences * view.shape.kv_heads *
           view.blocks_per_group;
}

int64_t score_tasks(const CompressView& view) { return 2 * score_units(view) * view.score_chunks; }

template <class T, int kDim>
bool score_window(const CompressView& view, Stream stream) {
    const auto tasks = static_cast<unsigned>(score_tasks(view));
    return launch(window_scores<T, kDim>, tasks, kScoreThreads, sizeof(ScoreShared<T, kDim>), stream, view);
}

template <class T>
bool score_window(const CompressView& view, Stream stream) {
    switch (view.shape.head_dim) {
        case 64:
            return score_window<T, 64>(view, stream);
        case 80:
            return score_window<T, 80>(view, stream);
        case 96:
            return score_window<T, 96>(view, stream);
        case 128:
            return score_window<T, 128>(view, stream);
        default:
            return score_window<T, 256>(view, stream);
    }
}

bool score_window(const CompressView& view, Stream stream) {
    switch (view.shape.dtype) {
        case STARKV_FLOAT32:
            return score_window<float>(view, stream);
        case STARKV_FLOAT16:
            return score_window<Half>(view, stream);
        default:
            return score_window<BFloat16>(view, stream);
    }
}

bool compact(const CompressView& view, Stream stream) {
    const auto& shape = view.shape;
    const auto row_bytes = static_cast<int>(shape.head_dim * element_bytes(shape.dtype));
    const auto tensors = static_cast<unsigned>(2 * shape.kv_heads + 1);
    const auto sequences = static_cast<unsigned>(shape.layers * shape.sequences);
    if (view.in_place)
        return launch(compact_rows_in_place, dim3(tensors, sequences), kInPlaceThreads, 0, stream, view,
                      row_bytes);
    const dim3 grid(
        static_cast<unsigned>(ceil_div(std::min(shape.slot_capacity, shape.capacity), kCompactRows)), tensors,
        sequences);
    return launch(compact_rows, grid, kCompactThreads, 0, stream, view, row_bytes);
}

bool launch_all(const CompressView& view, Stream stream) {
    const auto& shape = view.shape;
    const auto batch = static_cast<unsigned>(shape.sequences);
    const auto sequences = static_cast<unsigned>(shape.layers * shape.sequences);
    const dim3 rows(static_cast<unsigned>(view.row_chunks), sequences);
    const dim3 heads(static_cast<unsigned>(shape.kv_heads), sequences);
    const size_t budget_bytes = sizeof(BudgetShared) + shape.layers * sizeof(double);
    const auto counters = static_cast<int>(1 + 2 * score_units(view));
    return launch(prepare_sequences, batch, kPrepareThreads, sizeof(BlockScratch<int>), stream, view,
                  counters) &&
           score_window(view, stream) &&
           launch(norm_statistics, sequences, kRowThreads, sizeof(BlockScratch<float>), stream, view) &&
           launch(group_scores, rows, kRowThreads, sizeof(BlockScratch<float>), stream, view) &&
           launch(score_entropy, sequences, kEntropyThreads, sizeof(BlockScratch<float>), stream, view) &&
           launch(layer_budgets, batch, kBudgetThreads, budget_bytes, stream, view) &&
           launch(update_group_memory, heads, kMemoryThreads, sizeof(MemoryShared), stream, view) &&
           launch(final_scores, rows, kRowThreads, sizeof(FinalShared), stream, view) &&
           launch(select_rows, sequences, kSelectThreads, sizeof(SelectShared), stream, view) &&
           compact(view, stream);
}

}  // namespace
}  // namespace starkv

int starkv_compress_workspace(const starkv_compress_shape* shape, size_t* bytes) {
    if (!shape || !bytes) return STARKV_ERROR_NULL_POINTER;
    const int status = starkv::check_shape(*shape);
    if (status != STARKV_OK) return status;
    starkv::Workspace workspace(nullptr);
    const starkv::CompressView view = starkv::lay_out(*shape, workspace);
    if (starkv::score_tasks(view) > INT32_MAX) return STARKV_ERROR_SHAPE;
    *bytes = workspace.bytes();
    return STARKV_OK;
}

int starkv_compress(const starkv_compress_shape* shape, const starkv_compress_buffers* buffers,
                    void* workspace, size_t workspace_bytes, void* stream) {
    if (!shape || !buffers || !workspace) return STARKV_ERROR_NULL_POINTER;
    int status = starkv::check_shape(*shape);
    if (status == STARKV_OK) status = starkv::check_buffers(*shape, *buffers);
    if (status != STARKV_OK) return status;
    if (starkv::any_misaligned({workspace})) return STARKV_ERROR_MISALIGNED;
    starkv::Workspace parts(workspace);
    starkv::CompressView view = starkv::lay_out(*shape, parts);
    if (starkv::score_tasks(view) > INT32_MAX) return STARKV_ERROR_SHAPE;
    if (parts.bytes() > workspace_bytes) return STARKV_ERROR_WORKSPACE;
    view.buffers = *buffers;
    view.in_place = buffers->k == buffers->dst_k;
    return starkv::launch_all(view, static_cast<starkv::Stream>(stream)) ? STARKV_OK : STARKV_ERROR_LAUNCH;
}
