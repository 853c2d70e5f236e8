// SPDX-License-Identifier: Apache-2.0
// What the C ABI's functions share: checks of pointers, and laying out a workspace.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

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

inline bool supported_head_dim(int32_t dim) {
    return dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 256;
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
