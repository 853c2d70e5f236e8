// SPDX-License-Identifier: Apache-2.0
// What a row's numbers are on their way to codes and back. Every kernel that makes codes goes through here,
// so that a row has the same codes whichever of them stored it.
#pragma once

#include "elements.h"

namespace starkv {

// Of a position: t, h, w.
constexpr int kRopeComponents = 3;

// Nothing of this is fused, so that every device has the same codes.
#if STARKV_CPU
inline float rounded_product(float a, float b) { return a * b; }
#else
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
#endif

// A number's code; of what is no number, the lowest.
__device__ inline int code_of(float value, float scale, int bits) {
    const auto least = static_cast<float>(-(1 << (bits - 1)));
    return static_cast<int>(fminf(fmaxf(rintf(value / scale), least), -least - 1.0F));
}

// A code as it lies in a cache, in the lowest `bits` bits, and back: codes of 4 bits have 8 added.
__device__ inline uint32_t stored_code(int code, int bits) {
    return bits == 8 ? static_cast<uint32_t>(code) & 0xffU : static_cast<uint32_t>(code + 8);
}
__device__ inline int code_from(uint32_t stored, int bits) {
    return bits == 8 ? static_cast<int>((stored ^ 0x80U) & 0xffU) - 128 : static_cast<int>(stored & 0xfU) - 8;
}

// Whether the tables of cosines and sines have a position's angles.
__device__ inline bool in_tables(const int32_t* position, int table_rows) {
    bool known = true;
    for (int component = 0; component < kRopeComponents; ++component)
        known = known && position[component] >= 0 && position[component] < table_rows;
    return known;
}

// Which component of a position a pair of columns rotates by.
__device__ inline int component_of(const int32_t* mrope_section, int pair) {
    int component = 0, end = mrope_section[0];
    while (pair >= end) end += mrope_section[++component];
    return component;
}

// A column of the keys' bias, rotated. `partner` is the other column of its pair, and `leads` whether this
// one is the first of the two.
__device__ inline float rotated_column(float own, float partner, float cosine, float sine, bool leads) {
    const float kept = rounded_product(own, cosine), mixed_in = rounded_product(partner, sine);
    return leads ? kept - mixed_in : kept + mixed_in;
}

}  // namespace starkv
