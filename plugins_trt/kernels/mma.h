// SPDX-License-Identifier: Apache-2.0
// The tensor cores' smallest product: d[16][8] += a[16][16] * b[16][8] by one warp, sums in float32.
//
// With g = lane / 4 and t = lane % 4 a thread holds
//   a: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 in the first two registers, 2t + 8, 2t + 9 in the others
//   b: column g; rows 2t, 2t + 1 and 2t + 8, 2t + 9
//   d: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
// transpose_matrix() takes columns 2t and 2t + 1 of row g of 8 rows of 8 elements, and gives rows 2t and 2t +
// 1 of column g: half of a d, packed, becomes half of a b.
#pragma once

#include "elements.h"

namespace starkv {

#if STARKV_CPU

template <class T>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands {
        uint32_t a[4], b[2];
    } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const unsigned char* all = cpu_device::exchange(&mine, sizeof(mine));
    const int group = lane_index() / 4, thread = lane_index() % 4;
    for (int index = 0; index < 4; ++index) {
        const int upper = index / 2, column = 2 * thread + index % 2;
        for (int k = 0; k < 4; ++k) {
            const auto left = cpu_device::value_of<Operands>(all, group * 4 + k);
            const auto right = cpu_device::value_of<Operands>(all, column * 4 + k);
            for (int half = 0; half < 2; ++half) {
                const uint32_t x = left.a[2 * half + upper], y = right.b[half];
                d[index] += unpack_first<T>(x) * unpack_first<T>(y);
                d[index] += unpack_second<T>(x) * unpack_second<T>(y);
            }
        }
    }
}

inline uint32_t transpose_matrix(uint32_t pair) {
    const unsigned char* all = cpu_device::exchange(&pair, sizeof(pair));
    const int column = lane_index() / 4, row = 2 * (lane_index() % 4);
    const auto element = [&](int of_row) {
        return cpu_device::value_of<uint32_t>(all, of_row * 4 + column / 2) >> column % 2 * 16 & 0xffffU;
    };
    return element(row) | element(row + 1) << 16;
}

#else

__device__ inline uint32_t transpose_matrix(uint32_t pair) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

template <class T>
__device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void multiply_add<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace starkv
