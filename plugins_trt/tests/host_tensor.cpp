// SPDX-License-Identifier: Apache-2.0

#include "host_tensor.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace starkv::tests {

using nvinfer1::DataType;

namespace {

double from_half(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    const double size =
        exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -size : size;
}

std::uint16_t to_half(double value) {
    if (value == 0.0) return 0;
    int exponent = 0;
    const double fraction = std::frexp(std::abs(value), &exponent);  // 0.5 ... 1
    const auto significand = static_cast<int>(std::ldexp(fraction, 11));
    return static_cast<std::uint16_t>((value < 0 ? 1 << 15 : 0) | (exponent + 14) << 10 |
                                      (significand & 1023));
}

double from_bfloat16(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value = 0;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

std::uint16_t to_bfloat16(double value) {
    const auto narrow = static_cast<float>(value);
    std::uint32_t wide = 0;
    std::memcpy(&wide, &narrow, sizeof(wide));
    return static_cast<std::uint16_t>(wide >> 16);
}

template <class T>
T load(const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

template <class T>
void store(unsigned char* to, T value) {
    std::memcpy(to, &value, sizeof(T));
}

}  // namespace

HostTensor::HostTensor(const TensorSpec& spec)
    : spec_(spec), bytes_(element_count(spec) * element_bytes(spec.type)) {}

void HostTensor::fill(Index index, double value) {
    const Shape& shape = spec_.shape;
    std::size_t count = 1;
    for (std::size_t axis = index.size(); axis < shape.size(); ++axis) {
        count *= static_cast<std::size_t>(shape[axis]);
    }
    const std::size_t first = offset_of(index);
    for (std::size_t element = first; element < first + count; ++element) write(element, value);
}

std::size_t HostTensor::offset_of(Index index) const {
    std::size_t offset = 0;
    auto at = index.begin();
    for (const std::int64_t size : spec_.shape) {
        const std::int64_t position = at != index.end() ? *at++ : 0;
        if (position < 0 || position >= size) throw std::out_of_range("an index outside its tensor");
        offset = offset * static_cast<std::size_t>(size) + static_cast<std::size_t>(position);
    }
    return offset;
}

double HostTensor::read(std::size_t element) const {
    const unsigned char* from = bytes_.data() + element * element_bytes(spec_.type);
    switch (spec_.type) {
        case DataType::kHALF:
            return from_half(load<std::uint16_t>(from));
        case DataType::kBF16:
            return from_bfloat16(load<std::uint16_t>(from));
        case DataType::kFLOAT:
            return load<float>(from);
        case DataType::kINT8:
            return load<std::int8_t>(from);
        case DataType::kINT32:
            return load<std::int32_t>(from);
        case DataType::kINT64:
            return static_cast<double>(load<std::int64_t>(from));
        default:
            throw std::invalid_argument("a type that tests do not read");
    }
}

void HostTensor::write(std::size_t element, double value) {
    unsigned char* to = bytes_.data() + element * element_bytes(spec_.type);
    switch (spec_.type) {
        case DataType::kHALF:
            store(to, to_half(value));
            break;
        case DataType::kBF16:
            store(to, to_bfloat16(value));
            break;
        case DataType::kFLOAT:
            store(to, static_cast<float>(value));
            break;
        case DataType::kINT8:
            store(to, static_cast<std::int8_t>(value));
            break;
        case DataType::kINT32:
            store(to, static_cast<std::int32_t>(value));
            break;
        case DataType::kINT64:
            store(to, static_cast<std::int64_t>(value));
            break;
        default:
            throw std::invalid_argument("a type that tests do not write");
    }
    if (read(element) != value) throw std::invalid_argument("a value that its type does not hold exactly");
}

}  // namespace starkv::tests
