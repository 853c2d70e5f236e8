// SPDX-License-Identifier: Apache-2.0
// Codes of a quantized cache: where a thread's part of a row lies, and how codes become numbers.
//
// Codes are multiplied as 16-bit floats, which hold all of them exactly. A code's bits, put below the
// exponent of 1024, are 1024 more than the code; that, and what makes codes positive, is subtracted.
#pragma once

#include "bytes.h"
#include "elements.h"

namespace starkv {

// A row of `bytes * lanes` bytes is divided among the lanes in pieces of 16 bytes, and what is left of a
// lane's share in one piece each of 8, 4, 2 and 1 bytes, so that lanes side by side read bytes side by side.
// Where a byte of a lane's share lies in the row:
__host__ __device__ constexpr int byte_in_row(int bytes, int lanes, int lane, int byte) {
    int piece = 16, before = 0;
    while (byte >= before + piece || bytes - before < piece) {
        if (bytes - before >= piece)
            before += piece;
        else
            piece /= 2;
    }
    return before * lanes + lane * piece + byte - before;
}

// A lane's share of a row in registers, of which the last may have zeros at its end.
template <int kBytes, int kLanes>
struct LaneShare {
    static constexpr int kWords = (kBytes + 3) / 4;
    static_assert(kBytes % 4 != 3, "what does not fill a register is one piece");
    uint32_t words[kWords];

    __device__ void load(const unsigned char* row, int lane) {
        constexpr int kWhole = kBytes / 16;
#pragma unroll
        for (int i = 0; i < kWhole; ++i) {
            const auto piece = *reinterpret_cast<const uint4*>(row + (i * kLanes + lane) * 16);
            words[4 * i] = piece.x;
            words[4 * i + 1] = piece.y;
            words[4 * i + 2] = piece.z;
            words[4 * i + 3] = piece.w;
        }
        if constexpr ((kBytes & 8) != 0) {
            constexpr int kBefore = kBytes / 16 * 16;
            const auto piece = *reinterpret_cast<const uint2*>(row + kBefore * kLanes + lane * 8);
            words[kBefore / 4] = piece.x;
            words[kBefore / 4 + 1] = piece.y;
        }
        if constexpr ((kBytes & 4) != 0) {
            constexpr int kBefore = kBytes / 8 * 8;
            words[kBefore / 4] = *reinterpret_cast<const uint32_t*>(row + kBefore * kLanes + lane * 4);
        }
        if constexpr ((kBytes & 2) != 0) {
            constexpr int kBefore = kBytes / 4 * 4;
            words[kBefore / 4] = *reinterpret_cast<const uint16_t*>(row + kBefore * kLanes + lane * 2);
        }
        if constexpr ((kBytes & 1) != 0) {
            constexpr int kBefore = kBytes / 2 * 2;
            words[kBefore / 4] = row[kBefore * kLanes + lane];
        }
    }
};

__device__ inline uint32_t subtract_halves(uint32_t pair, uint32_t other) {
#if STARKV_CPU
    return pack<Half>(unpack_first<Half>(pair) - unpack_first<Half>(other),
                      unpack_second<Half>(pair) - unpack_second<Half>(other));
#else
    uint32_t result;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(other));
    return result;
#endif
}

// Pairs of 16-bit floats from words of codes.
template <int kBits>
struct Codes;

template <>
struct Codes<8> {
    static constexpr int kStepsOfWord = 1;
    static constexpr uint32_t kUpper = 0x64646464U;   // upper bytes of 1024
    static constexpr uint32_t kExcess = 0x64806480U;  // 1024 + 128

    // The code of a word that is element `i` of a thread's four in a step of a product of queries with keys.
    __host__ __device__ static constexpr int code_of(int /*step*/, int i) { return i; }
    // Elements 0 and 1, or 2 and 3.
    __device__ static uint32_t key_pair(uint32_t word, int /*step*/, int pair) {
        return widen(word ^ 0x80808080U, pair);
    }
    // Column 2 * pair + i of two rows, of their words the one that holds it.
    __device__ static uint32_t value_pair(const uint32_t* first, const uint32_t* second, int pair, int i) {
        const uint32_t both =
            select_bytes(first[pair / 2], second[pair / 2], pair % 2 ? 0x7362U : 0x5140U) ^ 0x80808080U;
        return widen(both, i);
    }

private:
    __device__ static uint32_t widen(uint32_t bytes, int half) {
        return subtract_halves(select_bytes(bytes, kUpper, half ? 0x4342U : 0x4140U), kExcess);
    }
};

template <>
struct Codes<4> {
    static constexpr int kStepsOfWord = 2;
    static constexpr uint32_t kMask = 0x000f000fU;
    static constexpr uint32_t kUpper = 0x64006400U;
    static constexpr uint32_t kExcess = 0x64086408U;  // 1024 + 8

    // Codes 16 bits apart are masked out together.
    __host__ __device__ static constexpr int code_of(int step, int i) {
        return step % 2 * 2 + i / 2 + i % 2 * 4;
    }
    __device__ static uint32_t key_pair(uint32_t word, int step, int pair) {
        return widen(word >> (step % 2 * 2 + pair) * 4);
    }
    __device__ static uint32_t value_pair(const uint32_t* first, const uint32_t* second, int pair, int i) {
        const uint32_t a = first[pair / 4], b = second[pair / 4];
        const uint32_t both = pair % 4 / 2 ? upper_halves(a, b) : lower_halves(a, b);
        return widen(both >> (pair % 2 * 2 + i) * 4);
    }

private:
    __device__ static uint32_t widen(uint32_t codes) {
        return subtract_halves((codes & kMask) | kUpper, kExcess);
    }
};

// Registers that hold a thread's quarter of a key of `bytes` bytes.
__host__ __device__ constexpr int key_words(int bytes) { return (bytes / 4 + 3) / 4; }

// Which element of a key is element `i` of the four that thread `t` of a quarter contributes to a step of the
// product with queries; -1 where a register holds no more of the row.
template <int kBits>
__host__ __device__ constexpr int key_element(int row_bytes, int step, int t, int i) {
    constexpr int kOfByte = 8 / kBits;
    const int word = step / Codes<kBits>::kStepsOfWord;
    const int code = word * 4 * kOfByte + Codes<kBits>::code_of(step, i);
    if (code >= row_bytes / 4 * kOfByte) return -1;
    return byte_in_row(row_bytes / 4, 4, t, code / kOfByte) * kOfByte + code % kOfByte;
}

// Which column of a value is column `i` of those that eighth `g` of a row holds.
template <int kBits>
__host__ __device__ constexpr int value_column(int row_bytes, int g, int i) {
    constexpr int kOfByte = 8 / kBits;
    return byte_in_row(row_bytes / 8, 8, g, i / kOfByte) * kOfByte + i % kOfByte;
}

}  // namespace starkv
