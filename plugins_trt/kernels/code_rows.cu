// SPDX-License-Identifier: Apache-2.0
// starkv_quantize_rows and starkv_dequantize_rows: checks and launches.

#include "code_rows.cuh"
#include "host.h"

namespace starkv {
namespace {

constexpr int kMostKvHeads = 64;
constexpr int kMostRows = 1 << 24;
constexpr int kMostTableRows = 1 << 20;
// Limit of a grid's second dimension.
constexpr int kMostGrid = 65535;

bool in_range(int32_t value, int32_t most) { return value >= 1 && value <= most; }

int check_shape(const starkv_code_rows_shape& shape) {
    if (shape.dtype != STARKV_FLOAT32 && shape.dtype != STARKV_FLOAT16 && shape.dtype != STARKV_BFLOAT16)
        return STARKV_ERROR_DTYPE;
    if (!supported_head_dim(shape.head_dim)) return STARKV_ERROR_HEAD_DIM;
    if (!in_range(shape.kv_heads, kMostKvHeads)) return STARKV_ERROR_HEADS;
    if (!in_range(shape.layers, kMostGrid) || !in_range(shape.capacity, kMostRows) ||
        !in_range(shape.slots, kMostGrid) || !in_range(shape.slot_capacity, kMostRows) ||
        !in_range(shape.table_rows, kMostTableRows))
        return STARKV_ERROR_SHAPE;
    if (shape.slot < 0 || shape.slot >= shape.slots) return STARKV_ERROR_ARGUMENT;
    if (shape.bits != 4 && shape.bits != 8) return STARKV_ERROR_ARGUMENT;
    return sections_fit(shape.mrope_section, shape.head_dim) ? STARKV_OK : STARKV_ERROR_ARGUMENT;
}

// Sizes of the tensors in bytes.
struct Sizes {
    size_t floats, codes, lengths, positions, parameters, table;

    explicit Sizes(const starkv_code_rows_shape& shape) {
        const auto layers = static_cast<size_t>(shape.layers), dim = static_cast<size_t>(shape.head_dim);
        const size_t heads = layers * static_cast<size_t>(shape.kv_heads);
        const size_t slot_rows = static_cast<size_t>(shape.slots) * static_cast<size_t>(shape.slot_capacity);
        floats = heads * static_cast<size_t>(shape.capacity) * dim * element_bytes(shape.dtype);
        codes = heads * slot_rows * dim * static_cast<size_t>(shape.bits) / 8;
        lengths = layers * sizeof(int32_t);
        positions = layers * slot_rows * kRopeComponents * sizeof(int32_t);
        parameters = heads * dim * sizeof(float);
        table = static_cast<size_t>(shape.table_rows) * (dim / 2) * sizeof(float);
    }
};

// What both directions read, and what one of them writes.
template <size_t kFrom, size_t kTo>
int check_overlap(const starkv_code_rows_buffers& buffers, const Sizes& sizes, const Part (&from)[kFrom],
                  const Part (&to)[kTo]) {
    const Part read[] = {{buffers.lengths, sizes.lengths},    {buffers.positions, sizes.positions},
                         {buffers.k_scale, sizes.parameters}, {buffers.v_scale, sizes.parameters},
                         {buffers.k_bias, sizes.parameters},  {buffers.v_bias, sizes.parameters},
                         {buffers.cos_table, sizes.table},    {buffers.sin_table, sizes.table}};
    return any_overlap(read, to, {}) || any_overlap(from, to, {}) ? STARKV_ERROR_OVERLAP : STARKV_OK;
}

int check_pointers(std::initializer_list<const void*> all) {
    if (any_null(all)) return STARKV_ERROR_NULL_POINTER;
    return any_misaligned(all) ? STARKV_ERROR_MISALIGNED : STARKV_OK;
}

int check_buffers(const starkv_code_rows_shape& shape, const starkv_code_rows_buffers& buffers,
                  bool quantizes) {
    int status = check_pointers({buffers.k, buffers.v, buffers.lengths, buffers.positions, buffers.k_scale,
                                 buffers.v_scale, buffers.k_bias, buffers.v_bias, buffers.cos_table,
                                 buffers.sin_table, buffers.k_codes, buffers.v_codes});
    if (status == STARKV_OK && quantizes) status = check_pointers({buffers.wrong_rows});
    if (status != STARKV_OK) return status;
    const Sizes sizes(shape);
    const Part floats[] = {{buffers.k, sizes.floats}, {buffers.v, sizes.floats}};
    if (quantizes)
        return check_overlap(buffers, sizes, floats,
                             {{buffers.k_codes, sizes.codes},
                              {buffers.v_codes, sizes.codes},
                              {buffers.wrong_rows, sizes.lengths}});
    return check_overlap(buffers, sizes, {{buffers.k_codes, sizes.codes}, {buffers.v_codes, sizes.codes}},
                         floats);
}

template <class T, int kBits>
bool move_rows(const CodeRowsView& view, bool quantizes, Stream stream) {
    const int most_rows = std::min(view.shape.capacity, view.shape.slot_capacity);
    const dim3 grid(static_cast<unsigned>(ceil_div(most_rows, kCodeRowsTile)),
                    static_cast<unsigned>(view.shape.layers));
    const auto kernel = quantizes ? quantize_rows<T, kBits> : dequantize_rows<T, kBits>;
    return launch(kernel, grid, kCodeRowsThreads, sizeof(RowTileShared), stream, view);
}

template <class T>
bool move_rows(const CodeRowsView& view, bool quantizes, Stream stream) {
    return view.shape.bits == 8 ? move_rows<T, 8>(view, quantizes, stream)
                                : move_rows<T, 4>(view, quantizes, stream);
}

bool move_rows(const CodeRowsView& view, bool quantizes, Stream stream) {
    switch (view.shape.dtype) {
        case STARKV_FLOAT32:
            return move_rows<float>(view, quantizes, stream);
        case STARKV_FLOAT16:
            return move_rows<Half>(view, quantizes, stream);
        default:
            return move_rows<BFloat16>(view, quantizes, stream);
    }
}

int check_and_move(const starkv_code_rows_shape* shape, const starkv_code_rows_buffers* buffers,
                   bool quantizes, void* stream) {
    if (!shape || !buffers) return STARKV_ERROR_NULL_POINTER;
    int status = check_shape(*shape);
    if (status == STARKV_OK) status = check_buffers(*shape, *buffers, quantizes);
    if (status != STARKV_OK) return status;
    const auto on = static_cast<Stream>(stream);
    // Blocks add to the counts in any order, so nothing but what comes before them can clear them.
    if (quantizes && !clear_on_device(buffers->wrong_rows, Sizes(*shape).lengths, on))
        return STARKV_ERROR_LAUNCH;
    const CodeRowsView view{*shape, *buffers, shape->head_dim * shape->bits / 8};
    return move_rows(view, quantizes, on) ? STARKV_OK : STARKV_ERROR_LAUNCH;
}

}  // namespace
}  // namespace starkv

int starkv_quantize_rows(const starkv_code_rows_shape* shape, const starkv_code_rows_buffers* buffers,
                         void* stream) {
    return starkv::check_and_move(shape, buffers, true, stream);
}

int starkv_dequantize_rows(const starkv_code_rows_shape* shape, const starkv_code_rows_buffers* buffers,
                           void* stream) {
    return starkv::check_and_move(shape, buffers, false, stream);
}
