// SPDX-License-Identifier: Apache-2.0
// A tensor in host memory whose elements are read and written as numbers, whatever their type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "tensor_specs.h"

namespace starkv::tests {

class HostTensor {
public:
    // All zeros.
    explicit HostTensor(const TensorSpec& spec);

    using Index = std::initializer_list<std::int64_t>;
    double get(Index index) const { return read(offset_of(index)); }
    // The value must be one that the element type holds exactly.
    void set(Index index, double value) { write(offset_of(index), value); }
    // All elements below an index that leaves dimensions out.
    void fill(Index index, double value);

    const TensorSpec& spec() const { return spec_; }
    std::size_t byte_count() const { return bytes_.size(); }
    unsigned char* data() { return bytes_.data(); }
    const unsigned char* data() const { return bytes_.data(); }

private:
    std::size_t offset_of(Index index) const;
    double read(std::size_t element) const;
    void write(std::size_t element, double value);

    TensorSpec spec_;
    std::vector<unsigned char> bytes_;
};

}  // namespace starkv::tests
