// SPDX-License-Identifier: Apache-2.0
// Which rows stay: the window, and of those before it the best by (score descending, row ascending).
#pragma once

#include "compress_view.h"
#include "radix.h"

namespace starkv {

constexpr int kSelectThreads = 1024;

struct SelectShared {
    RadixScratch<1> radix;
    BlockScratch<int> scan;
};

// A block for each sequence of each layer.
__global__ void __launch_bounds__(kSelectThreads) select_rows(CompressView view) {
    const Sequence sequence(view, static_cast<int>(blockIdx.x));
    auto& shared = shared_memory<SelectShared>();
    const int thread = static_cast<int>(threadIdx.x), slot_capacity = view.shape.slot_capacity;
    const size_t outputs = static_cast<size_t>(sequence.index) * slot_capacity;
    int64_t* rows = view.buffers.rows ? view.buffers.rows + outputs : nullptr;
    int* source_rows = view.source_rows + outputs;
    int kept = 0;
    if (sequence.valid) {
        const int competing = view.competing[sequence.index];
        const uint32_t* keys = view.keys + static_cast<size_t>(sequence.index) * view.shape.capacity;
        const auto key_of = [&](int row) { return sort_key(keys[row], row); };
        const int ranks[1] = {competing};
        radix_bounds(ranks, sequence.past, key_of, shared.radix);
        const SortKey bound = shared.radix.bits[0];
        for (int start = 0; start < sequence.length; start += kSelectThreads) {
            const int row = start + thread;
            const bool stays = row < sequence.past ? key_of(row) < bound : row < sequence.length;
            const auto place = block_running_sum(static_cast<int>(stays), shared.scan);
            if (stays) {
                source_rows[kept + place.before] = row;
                if (rows) rows[kept + place.before] = row;
            }
            kept += place.total;
        }
    }
    for (int i = kept + thread; rows && i < slot_capacity; i += kSelectThreads) rows[i] = -1;
    if (thread == 0) view.buffers.new_len[sequence.index] = kept;
}

}  // namespace starkv
