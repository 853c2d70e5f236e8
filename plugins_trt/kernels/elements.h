// SPDX-License-Identifier: Apache-2.0
// Element types of caches, and conversions that are the same on the GPU and on the CPU.
#pragma once

#include <cstring>
#include <type_traits>

#include "platform.h"

namespace starkv {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class To, class From>
__host__ __device__ inline To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "of the same size");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

__host__ __device__ inline float to_float(float value) { return value; }
__host__ __device__ inline float to_float(BFloat16 value) {
    return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
__host__ __device__ inline float to_float(Half value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000U) << 16;
    const uint32_t exponent = (value.bits >> 10) & 31U, fraction = value.bits & 0x3ffU;
    if (exponent == 31U) return bit_cast<float>(sign | 0x7f800000U | fraction << 13);
    if (exponent) return bit_cast<float>(sign | (exponent + 112U) << 23 | fraction << 13);
    const float subnormal = static_cast<float>(fraction) * 5.9604644775390625e-8F;  // 2^-24
    return sign ? -subnormal : subnormal;
#endif
}

// To the nearest, of equally near ones to the even.
template <class T>
__host__ __device__ T from_float(float value);

template <>
__host__ __device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__host__ __device__ inline BFloat16 from_float<BFloat16>(float value) {
    const auto bits = bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffU) > 0x7f800000U) return {static_cast<uint16_t>(bits >> 16 | 0x40U)};
    return {static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
}
template <>
__host__ __device__ inline Half from_float<Half>(float value) {
#ifdef __CUDA_ARCH__
    Half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const auto bits = bit_cast<uint32_t>(value);
    const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
    const float size = fabsf(value);
    if (!(size == size)) return {static_cast<uint16_t>(sign | 0x7e00U)};
    if (size >= 65520.0F) return {static_cast<uint16_t>(sign | 0x7c00U)};
    // A multiple of 2^-24 below 2^-14, of 2^(e - 10) above: adding 2^13 times the unit's 2^10 rounds to it.
    if (size < 6.103515625e-5F)
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(rintf(size * 16777216.0F)))};
    const uint32_t magnitude = bits & 0x7fffffffU;
    const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>((rounded - 0x38000000U) >> 13))};
#endif
}

// Two neighbouring elements in one register, the first in the lower half.
template <class T>
__host__ __device__ inline uint32_t pack(float first, float second) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    if constexpr (std::is_same_v<T, Half>)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
#endif
}
template <class T>
__host__ __device__ inline float unpack_first(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair & 0xffffU)});
}
template <class T>
__host__ __device__ inline float unpack_second(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// Integers in the order of the numbers; both zeros are one. NaN is for the caller to replace.
__host__ __device__ inline uint32_t ordered_key(float value) {
    const auto bits = bit_cast<uint32_t>(value + 0.0F);
    return bits ^ (bits >> 31 ? 0xffffffffU : 0x80000000U);
}

}  // namespace starkv
