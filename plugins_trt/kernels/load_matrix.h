// SPDX-License-Identifier: Apache-2.0
// Sixteen rows of 16 elements of 16 bits, from shared memory into the registers that multiply_add() wants.
//
// Every lane names where 8 elements of a row begin; four groups of 8 lanes name the quarters of the matrix.
// With g = lane / 4 and t = lane % 4 a thread gets of each quarter, one register for each,
//   load_matrix:             columns 2t and 2t + 1 of row g
//   load_matrix_transposed:  rows 2t and 2t + 1 of column g
// so that the result is
//   load_matrix(row_parts):                 operand a
//   load_matrix(column_parts):              two operands b, whose columns are the upper and the lower rows
//   load_matrix_transposed(row_parts):      two operands b, of the left and of the right columns
#pragma once

#include "elements.h"

namespace starkv {

// Where this lane's 8 elements begin in 16 rows that lie `stride` elements apart. Quarters in the order upper
// left, lower left, upper right, lower right.
template <class T>
__device__ inline const T* row_parts(const T* first_row, int stride) {
    return first_row + lane_index() % 16 * stride + lane_index() / 16 * 8;
}

// In the order upper left, upper right, lower left, lower right.
template <class T>
__device__ inline const T* column_parts(const T* first_row, int stride) {
    return first_row + (lane_index() % 8 + lane_index() / 16 * 8) * stride + lane_index() / 8 % 2 * 8;
}

#if STARKV_CPU

template <class T>
inline void load_matrix(uint32_t (&result)[4], const T* part) {
    const unsigned char* parts = cpu_device::exchange(&part, sizeof(part));
    for (int matrix = 0; matrix < 4; ++matrix) {
        const T* row = cpu_device::value_of<const T*>(parts, 8 * matrix + lane_index() / 4);
        std::memcpy(&result[matrix], row + 2 * (lane_index() % 4), sizeof(uint32_t));
    }
}

template <class T>
inline void load_matrix_transposed(uint32_t (&result)[4], const T* part) {
    const unsigned char* parts = cpu_device::exchange(&part, sizeof(part));
    for (int matrix = 0; matrix < 4; ++matrix) {
        const int row = 8 * matrix + 2 * (lane_index() % 4), column = lane_index() / 4;
        const T first = cpu_device::value_of<const T*>(parts, row)[column];
        const T second = cpu_device::value_of<const T*>(parts, row + 1)[column];
        result[matrix] = first.bits | static_cast<uint32_t>(second.bits) << 16;
    }
}

#else

template <class T>
__device__ inline void load_matrix(uint32_t (&result)[4], const T* part) {
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(part));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared)
                 : "memory");
}

template <class T>
__device__ inline void load_matrix_transposed(uint32_t (&result)[4], const T* part) {
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(part));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared)
                 : "memory");
}

#endif

}  // namespace starkv
