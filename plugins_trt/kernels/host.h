// SPDX-License-Identifier: Apache-2.0
// What the C ABI's functions share: checks of pointers, and laying out a workspace.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <utility>

#include "starkv_kernels.h"

namespace starkv {

constexpr size_t kAlignment = 16;

inline bool any_null(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers)
        if (!pointer) return true;
    return false;
}

inline bool any_misaligned(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers)
        if (reinterpret_cast<uintptr_t>(pointer) % kAlignment) return true;
    return false;
}

inline bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
    const auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
    return first < second + b_bytes && second < first + a_bytes;
}

struct Part {
    const void* start;
    size_t bytes;
};

// Whether a tensor that is written overlaps one that is read or written. A tensor may be read where it is
// written if the two are one of the pairs.
template <size_t kRead, size_t kWritten>
bool any_overlap(const Part (&read)[kRead], const Part (&written)[kWritten],
                 std::initializer_list<std::pair<const void*, const void*>> in_place) {
    for (const Part& to : written) {
        for (const Part& from : read) {
            const bool allowed = std::any_of(in_place.begin(), in_place.end(), [&](const auto& pair) {
                return pair.first == from.start && pair.second == to.start;
            });
            if (!allowed && overlap(from.start, from.bytes, to.start, to.bytes)) return true;
        }
        for (const Part& other : written)
            if (&other != &to && overlap(other.start, other.bytes, to.start, to.bytes)) return true;
    }
    return false;
}

inline bool supported_head_dim(int32_t dim) {
    return dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 256;
}

// Whether the sections of M-RoPE are the pairs of columns of a head.
inline bool sections_fit(const int32_t (&mrope_section)[3], int32_t head_dim) {
    int64_t pairs = 0;
    for (const int32_t section : mrope_section) {
        if (section < 0) return false;
        pairs += section;
    }
    return pairs == head_dim / 2;
}

inline size_t element_bytes(int32_t dtype) { return dtype == STARKV_FLOAT32 ? 4 : 2; }

// Hands out parts of a workspace; with no memory behind it, only counts.
class Workspace {
public:
    explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

    template <class T>
    T* take(size_t count) {
        T* part = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
        bytes_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
        return part;
    }
    size_t bytes() const { return bytes_; }

private:
    unsigned char* memory_;
    size_t bytes_ = 0;
};

}  // namespace starkv
