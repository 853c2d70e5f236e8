// SPDX-License-Identifier: Apache-2.0
// Picking bytes out of registers.
#pragma once

#include "platform.h"

namespace starkv {

// Byte i of the result is the one of `second:first` that digit i of the selector names, the lowest first.
__device__ inline uint32_t select_bytes(uint32_t first, uint32_t second, uint32_t selector) {
#if STARKV_CPU
    const uint64_t both = static_cast<uint64_t>(second) << 32 | first;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7U) * 8 & 0xffU) << 8 * i;
    return result;
#else
    return __byte_perm(first, second, selector);
#endif
}

// One half of each of two registers side by side, the first in the lower half.
__device__ inline uint32_t lower_halves(uint32_t first, uint32_t second) {
    return select_bytes(first, second, 0x5410);
}
__device__ inline uint32_t upper_halves(uint32_t first, uint32_t second) {
    return select_bytes(first, second, 0x7632);
}

}  // namespace starkv
