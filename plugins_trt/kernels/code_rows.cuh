// SPDX-License-Identifier: Apache-2.0
// Rows of a float cache into a slot of a cache of codes, and back; all layers in one launch.
//
// A block has some rows of a layer, with all KV heads, so that it can tell which of its rows are wrong. A
// thread keeps the scales and biases of its columns in registers while it goes through the rows.
#pragma once

#include <cfloat>

#include "code_rows_columns.h"

namespace starkv {

// What a thread does with its columns of a row: `work(columns, row)`, for all columns of all rows of the
// tile.
template <class Work>
__device__ void for_columns_of_rows(const CodeRowsView& view, const RowTile& tile, Work work) {
    const int shares = 2 * view.shape.kv_heads * (view.shape.head_dim / kColumns);
    const int rows_at_once = max(1, kCodeRowsThreads / shares);
    const int thread = static_cast<int>(threadIdx.x), first_row = thread / shares;
    if (first_row >= rows_at_once) return;
    for (int share = thread % shares; share < shares; share += kCodeRowsThreads) {
        const RowColumns columns(view, tile.layer, share);
        for (int row = first_row; row < tile.rows; row += rows_at_once) work(columns, row);
    }
}

// Grid: tiles of rows, layers. The counts of wrong rows are 0 before.
template <class T, int kBits>
__global__ void __launch_bounds__(kCodeRowsThreads) quantize_rows(CodeRowsView view) {
    auto& shared = shared_memory<RowTileShared>();
    const RowTile tile(view);
    if (!tile.sound && blockIdx.x == 0 && threadIdx.x == 0) view.buffers.wrong_rows[tile.layer] = -1;
    if (tile.rows <= 0) return;
    look_up_angles(view, tile, shared);
    for_columns_of_rows(view, tile, [&](const RowColumns& columns, int row) {
        float numbers[kColumns], biases[kColumns];
        load_columns(columns.floats<T>(view, tile, row), numbers);
        bool finite = true;
        for (const float number : numbers) finite = finite && fabsf(number) <= FLT_MAX;
        if (!finite) atomic_add(&shared.wrong[row], 1);
        // A row without a place in the tables has no codes.
        if (!shared.placed[row]) return;
        columns.biases(shared, row, biases);
        CodeColumns<kBits> codes{};
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            codes.set(i, code_of(numbers[i] - biases[i], columns.scale[i], kBits));
        codes.store(columns.codes(view, tile, row));
    });
    __syncthreads();
    if (warp_index() > 0) return;
    const int lane = lane_index();
    const int wrong = count_bits(ballot(lane < tile.rows && shared.wrong[lane] > 0));
    if (lane == 0 && wrong > 0) atomic_add(&view.buffers.wrong_rows[tile.layer], wrong);
}

// Grid: tiles of rows, layers. Keys without a place in the tables become NaN.
template <class T, int kBits>
__global__ void __launch_bounds__(kCodeRowsThreads) dequantize_rows(CodeRowsView view) {
    auto& shared = shared_memory<RowTileShared>();
    const RowTile tile(view);
    if (tile.rows <= 0) return;
    look_up_angles(view, tile, shared);
    for_columns_of_rows(view, tile, [&](const RowColumns& columns, int row) {
        float numbers[kColumns], biases[kColumns];
        CodeColumns<kBits> codes{};
        codes.load(columns.codes(view, tile, row));
        columns.biases(shared, row, biases);
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            numbers[i] = rounded_product(static_cast<float>(codes.get(i)), columns.scale[i]) + biases[i];
        store_columns(numbers, columns.floats<T>(view, tile, row));
    });
}

}  // namespace starkv
