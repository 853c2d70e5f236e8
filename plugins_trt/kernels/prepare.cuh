// SPDX-License-Identifier: Apache-2.0
// Before anything else: which sequences can be compressed, and counters at 0.
#pragma once

#include "block.h"
#include "compress_view.h"

namespace starkv {

constexpr int kPrepareThreads = 256;

// A block for each sequence; all of them clear `counters` numbers from counters.next_task on.
__global__ void __launch_bounds__(kPrepareThreads) prepare_sequences(CompressView view, int counters) {
    auto& scratch = shared_memory<BlockScratch<int>>();
    const int sequence = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    int unsound = 0;
    for (int layer = thread; layer < view.shape.layers; layer += kPrepareThreads)
        unsound += !Sequence(view, layer * view.shape.sequences + sequence, true).is_sound(view);
    unsound = block_sum(unsound, scratch);
    if (thread == 0) view.accepted[sequence] = unsound == 0;
    const int stride = static_cast<int>(gridDim.x) * kPrepareThreads;
    for (int i = sequence * kPrepareThreads + thread; i < counters; i += stride)
        view.counters.next_task[i] = 0;
}

}  // namespace starkv
