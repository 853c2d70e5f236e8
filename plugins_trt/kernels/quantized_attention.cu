// SPDX-License-Identifier: Apache-2.0
// starkv_quantized_attention: checks, workspace, and the order of the kernels.

#include "attention_merge.cuh"
#include "quantized_prepare.cuh"

namespace starkv {
namespace {

constexpr int kMostKvHeads = 64;
constexpr int kMostRows = 1 << 24;
constexpr int kMostTableRows = 1 << 20;
// Limit of a grid's second and third dimension.
constexpr int kMostGrid = 65535;

template <class T>
__device__ void store_four(T* to, float4 four) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(four.x, four.y), pack<T>(four.z, four.w));
}
template <>
__device__ void store_four(float* to, float4 four) {
    *reinterpret_cast<float4*>(to) = four;
}

// Grid: query heads, sequences. What depends on a column only is left to the end.
template <class T, int kDim>
__global__ void __launch_bounds__(kMergeThreads) merge_codes(QuantizedView view) {
    using Shared = MergeShared<kDim>;
    const QuantizedSequence sequence(view, static_cast<int>(blockIdx.y));
    const int head = static_cast<int>(blockIdx.x), vector = static_cast<int>(threadIdx.x);
    const int splits = sequence.valid ? DecodeSplits(view.parts.splits, sequence.held + 1).used : 0;
    const size_t of_all = static_cast<size_t>(sequence.index) * view.shape.query_heads + head;
    const float4 merged = merge_parts(shared_memory<Shared>(), view.parts, of_all, splits);
    if (vector >= Shared::kVectors) return;
    const int column = head / view.sharing * kDim + 4 * vector;
    const float4 scale = *reinterpret_cast<const float4*>(view.buffers.v_scale + column);
    const float4 bias = *reinterpret_cast<const float4*>(view.buffers.v_bias + column);
    float4 out{0.0F, 0.0F, 0.0F, 0.0F};
    if (sequence.valid)
        out = {fmaf(merged.x, scale.x, bias.x), fmaf(merged.y, scale.y, bias.y),
               fmaf(merged.z, scale.z, bias.z), fmaf(merged.w, scale.w, bias.w)};
    store_four(static_cast<T*>(view.buffers.out) + of_all * kDim + 4 * vector, out);
}

int check_shape(const starkv_quantized_attention_shape& shape) {
    if (shape.dtype != STARKV_FLOAT32 && shape.dtype != STARKV_FLOAT16 && shape.dtype != STARKV_BFLOAT16)
        return STARKV_ERROR_DTYPE;
    if (!supported_head_dim(shape.head_dim)) return STARKV_ERROR_HEAD_DIM;
    if (shape.kv_heads < 1 || shape.kv_heads > kMostKvHeads || shape.query_heads < 1 ||
        shape.query_heads > kMostGrid || shape.query_heads % shape.kv_heads)
        return STARKV_ERROR_HEADS;
    if (shape.sequences < 1 || shape.sequences > kMostGrid / shape.kv_heads || shape.capacity < 1 ||
        shape.capacity > kMostRows || shape.table_rows < 1 || shape.table_rows > kMostTableRows)
        return STARKV_ERROR_SHAPE;
    if (shape.bits != 4 && shape.bits != 8) return STARKV_ERROR_ARGUMENT;
    return sections_fit(shape.mrope_section, shape.head_dim) ? STARKV_OK : STARKV_ERROR_ARGUMENT;
}

QuantizedView lay_out(const starkv_quantized_attention_shape& shape, Workspace& workspace) {
    QuantizedView view{};
    view.shape = shape;
    view.sharing = shape.query_heads / shape.kv_heads;
    view.block_tiles = view.sharing > kTileHeads ? 2 : 1;
    const int blocks_of_head = ceil_div(view.sharing, kTileHeads * view.block_tiles);
    view.tiles = blocks_of_head * view.block_tiles;
    // 16 bits hold what 16-bit queries have; of a float32 a second number holds the rest.
    view.terms = shape.dtype == STARKV_FLOAT32 ? 2 : 1;
    view.row_bytes = shape.head_dim * shape.bits / 8;
    view.steps =
        key_words(view.row_bytes) * (shape.bits == 8 ? Codes<8>::kStepsOfWord : Codes<4>::kStepsOfWord);
    const int groups = shape.sequences * shape.kv_heads;
    view.parts = AttentionParts::lay_out(groups * blocks_of_head, shape.sequences * shape.query_heads,
                                         shape.head_dim, shape.capacity, workspace);
    const size_t tiles = static_cast<size_t>(groups) * view.tiles;
    view.queries = workspace.take<uint2>(tiles * view.terms * view.steps * kWarp);
    view.factors = workspace.take<float>(tiles * kTileHeads);
    view.coefficients = workspace.take<float2>(tiles * (shape.head_dim / 2) * kTileHeads);
    view.tables = workspace.take<float>(tiles * kRopeComponents * shape.table_rows * kTileHeads);
    return view;
}

int check_buffers(const QuantizedView& view, const starkv_quantized_attention_buffers& buffers) {
    const std::initializer_list<const void*> all = {
        buffers.q,         buffers.k,         buffers.v,         buffers.past_k,
        buffers.past_v,    buffers.kv_len,    buffers.positions, buffers.k_scale,
        buffers.v_scale,   buffers.k_bias,    buffers.v_bias,    buffers.cos_table,
        buffers.sin_table, buffers.present_k, buffers.present_v, buffers.out};
    if (any_null(all)) return STARKV_ERROR_NULL_POINTER;
    if (any_misaligned(all)) return STARKV_ERROR_MISALIGNED;
    const auto& shape = view.shape;
    const size_t sequences = static_cast<size_t>(shape.sequences), dim = static_cast<size_t>(shape.head_dim);
    const size_t heads_dim = dim * static_cast<size_t>(shape.kv_heads);
    const size_t query_bytes = sequences * shape.query_heads * dim * element_bytes(shape.dtype);
    const size_t new_bytes = sequences * heads_dim * element_bytes(shape.dtype);
    const size_t cache_bytes = sequences * shape.kv_heads * shape.capacity * view.row_bytes;
    const size_t position_bytes = sequences * shape.capacity * kRopeComponents * sizeof(int32_t);
    const size_t parameter_bytes = heads_dim * sizeof(float);
    const size_t table_bytes = static_cast<size_t>(shape.table_rows) * (dim / 2) * sizeof(float);
    const Part read[] = {{buffers.q, query_bytes},
                         {buffers.k, new_bytes},
                         {buffers.v, new_bytes},
                         {buffers.past_k, cache_bytes},
                         {buffers.past_v, cache_bytes},
                         {buffers.kv_len, sequences * sizeof(int32_t)},
                         {buffers.positions, position_bytes},
                         {buffers.k_scale, parameter_bytes},
                         {buffers.v_scale, parameter_bytes},
                         {buffers.k_bias, parameter_bytes},
                         {buffers.v_bias, parameter_bytes},
                         {buffers.cos_table, table_bytes},
                         {buffers.sin_table, table_bytes}};
    const Part written[] = {
        {buffers.present_k, cache_bytes}, {buffers.present_v, cache_bytes}, {buffers.out, query_bytes}};
    const bool overlapping = any_overlap(
        read, written, {{buffers.past_k, buffers.present_k}, {buffers.past_v, buffers.present_v}});
    return overlapping ? STARKV_ERROR_OVERLAP : STARKV_OK;
}

bool copy_caches(const QuantizedView& view, Stream stream) {
    const auto& buffers = view.buffers;
    const size_t heads = static_cast<size_t>(view.shape.sequences) * view.shape.kv_heads;
    const size_t bytes = heads * view.shape.capacity * view.row_bytes;
    return (buffers.present_k == buffers.past_k ||
            copy_on_device(buffers.present_k, buffers.past_k, bytes, stream)) &&
           (buffers.present_v == buffers.past_v ||
            copy_on_device(buffers.present_v, buffers.past_v, bytes, stream));
}

template <class T>
bool prepare(const QuantizedView& view, Stream stream) {
    const auto& shape = view.shape;
    const int table_blocks = std::min(kMostTableBlocks, ceil_div(shape.table_rows, kTablePositions));
    const dim3 grid(static_cast<unsigned>(1 + table_blocks),
                    static_cast<unsigned>(shape.sequences * shape.kv_heads));
    return launch(prepare_codes<T>, grid, kPrepareThreads, sizeof(PrepareShared), stream, view);
}

template <class T, int kDim>
bool merge(const QuantizedView& view, Stream stream) {
    const dim3 heads(static_cast<unsigned>(view.shape.query_heads),
                     static_cast<unsigned>(view.shape.sequences));
    return launch(merge_codes<T, kDim>, heads, kMergeThreads, sizeof(MergeShared<kDim>), stream, view);
}

template <class T>
bool merge(const QuantizedView& view, Stream stream) {
    switch (view.shape.head_dim) {
        case 64:
            return merge<T, 64>(view, stream);
        case 80:
            return merge<T, 80>(view, stream);
        case 96:
            return merge<T, 96>(view, stream);
        case 128:
            return merge<T, 128>(view, stream);
        default:
            return merge<T, 256>(view, stream);
    }
}

template <class T>
bool attend(const QuantizedView& view, Stream stream) {
    return copy_caches(view, stream) && prepare<T>(view, stream) &&
           (view.shape.bits == 8 ? decode_codes<8>(view, stream) : decode_codes<4>(view, stream)) &&
           merge<T>(view, stream);
}

bool attend(const QuantizedView& view, Stream stream) {
    switch (view.shape.dtype) {
        case STARKV_FLOAT32:
            return attend<float>(view, stream);
        case STARKV_FLOAT16:
            return attend<Half>(view, stream);
        default:
            return attend<BFloat16>(view, stream);
    }
}

}  // namespace
}  // namespace starkv

int starkv_quantized_attention_workspace(const starkv_quantized_attention_shape* shape, size_t* bytes) {
    if (!shape || !bytes) return STARKV_ERROR_NULL_POINTER;
    const int status = starkv::check_shape(*shape);
    if (status != STARKV_OK) return status;
    starkv::Workspace workspace(nullptr);
    starkv::lay_out(*shape, workspace);
    *bytes = workspace.bytes();
    return STARKV_OK;
}

int starkv_quantized_attention(const starkv_quantized_attention_shape* shape,
                               const starkv_quantized_attention_buffers* buffers, void* workspace,
                               size_t workspace_bytes, void* stream) {
    if (!shape || !buffers) return STARKV_ERROR_NULL_POINTER;
    int status = starkv::check_shape(*shape);
    if (status != STARKV_OK) return status;
    starkv::Workspace parts(workspace);
    starkv::QuantizedView view = starkv::lay_out(*shape, parts);
    status = starkv::check_buffers(view, *buffers);
    if (status != STARKV_OK) return status;
    if (!workspace) return STARKV_ERROR_NULL_POINTER;
    if (starkv::any_misaligned({workspace})) return STARKV_ERROR_MISALIGNED;
    if (parts.bytes() > workspace_bytes) return STARKV_ERROR_WORKSPACE;
    view.buffers = *buffers;
    return starkv::attend(view, static_cast<starkv::Stream>(stream)) ? STARKV_OK : STARKV_ERROR_LAUNCH;
}
