// SPDX-License-Identifier: Apache-2.0
// Moves the rows that stay to the front of a slot: keys, values and metadata.
#pragma once

#include "compress_view.h"

namespace starkv {

constexpr int kCompactThreads = 256;
constexpr int kCompactRows = 64;
constexpr int kInPlaceThreads = 512;

// One of the tensors that move, as rows of 16-byte vectors: every head's keys, then values, then the
// metadata.
struct MovedTensor {
    const uint4* from;
    uint4* to;
    int vectors;  // of a row

    __device__ MovedTensor(const CompressView& view, const Sequence& sequence, int tensor, int row_bytes) {
        const auto& shape = view.shape;
        const auto& buffers = view.buffers;
        const size_t target =
            static_cast<size_t>(sequence.index / shape.sequences) * shape.slots + sequence.slot;
        const void* source = buffers.row_meta;
        void* destination = buffers.dst_meta;
        size_t from_head = static_cast<size_t>(sequence.index), to_head = target;
        vectors = 1;
        if (tensor < 2 * shape.kv_heads) {
            const int head = tensor % shape.kv_heads;
            source = tensor < shape.kv_heads ? buffers.k : buffers.v;
            destination = tensor < shape.kv_heads ? buffers.dst_k : buffers.dst_v;
            from_head = from_head * shape.kv_heads + head;
            to_head = to_head * shape.kv_heads + head;
            vectors = row_bytes / 16;
        }
        from = static_cast<const uint4*>(source) + from_head * shape.capacity * vectors;
        to = static_cast<uint4*>(destination) + to_head * shape.slot_capacity * vectors;
    }
};

// Some of a tensor's vectors on their way, in registers: enough at once to keep the memory busy.
template <int kThreads, int kInFlight>
struct MovingVectors {
    static constexpr int kCount = kThreads * kInFlight;
    uint4 held[kInFlight];

    // Vectors start ... start + kCount - 1 of the destination, as far as they lie before `end`.
    __device__ void load(const MovedTensor& tensor, const int* source_rows, unsigned start, unsigned end) {
        const auto vectors = static_cast<unsigned>(tensor.vectors);
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
            const unsigned i = start + n * kThreads + threadIdx.x;
            if (i >= end) break;
            held[n] = tensor.from[static_cast<size_t>(source_rows[i / vectors]) * vectors + i % vectors];
        }
    }
    __device__ void store(const MovedTensor& tensor, unsigned start, unsigned end) const {
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
            const unsigned i = start + n * kThreads + threadIdx.x;
            if (i < end) tensor.to[i] = held[n];
        }
    }
};

// Into other memory: a block for kCompactRows rows of one tensor of a sequence.
__global__ void __launch_bounds__(kCompactThreads) compact_rows(CompressView view, int row_bytes) {
    const Sequence sequence(view, static_cast<int>(blockIdx.z));
    const int first = static_cast<int>(blockIdx.x) * kCompactRows;
    const int kept = view.buffers.new_len[sequence.index];
    if (first >= kept) return;
    const MovedTensor tensor(view, sequence, static_cast<int>(blockIdx.y), row_bytes);
    const int* source_rows =
        view.source_rows + static_cast<size_t>(sequence.index) * view.shape.slot_capacity;
    const auto end = static_cast<unsigned>(min(first + kCompactRows, kept) * tensor.vectors);
    MovingVectors<kCompactThreads, 4> moving;
    for (unsigned start = first * tensor.vectors; start < end; start += moving.kCount) {
        moving.load(tensor, source_rows, start, end);
        moving.store(tensor, start, end);
    }
}

// Within the same memory: a block for one tensor of a sequence, from front to back. A row never moves back,
// so what one step overwrites no later step reads; within a step all reads come before all writes.
__global__ void __launch_bounds__(kInPlaceThreads) compact_rows_in_place(CompressView view, int row_bytes) {
    const Sequence sequence(view, static_cast<int>(blockIdx.y));
    const MovedTensor tensor(view, sequence, static_cast<int>(blockIdx.x), row_bytes);
    const int* source_rows =
        view.source_rows + static_cast<size_t>(sequence.index) * view.shape.slot_capacity;
    const auto end = static_cast<unsigned>(view.buffers.new_len[sequence.index] * tensor.vectors);
    MovingVectors<kInPlaceThreads, 8> moving;
    for (unsigned start = 0; start < end; start += moving.kCount) {
        moving.load(tensor, source_rows, start, end);
        __syncthreads();
        moving.store(tensor, start, end);
        __syncthreads();
    }
}

}  // namespace starkv
