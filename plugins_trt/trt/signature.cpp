// SPDX-License-Identifier: Apache-2.0

#include "signature.h"

#include <algorithm>

#include "logging.h"

namespace starkv::trt {

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;

struct Dimension {
    char letter;  // 0 where the size is a number
    std::int64_t size;
};

struct Shape {
    int rank = 0;
    Dimension of[Dims::MAX_DIMS] = {};
};

Shape parse(const char* text) {
    Shape shape;
    while (*text != '\0') {
        Dimension& dimension = shape.of[shape.rank++];
        if (*text >= 'A' && *text <= 'Z') dimension.letter = *text++;
        while (*text >= '0' && *text <= '9') dimension.size = 10 * dimension.size + (*text++ - '0');
        if (*text == ' ') ++text;
    }
    return shape;
}

const char* type_name(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return "float32";
        case DataType::kHALF:
            return "float16";
        case DataType::kBF16:
            return "bfloat16";
        case DataType::kINT8:
            return "int8";
        case DataType::kINT32:
            return "int32";
        case DataType::kINT64:
            return "int64";
        default:
            return "another type";
    }
}

// A shape whose last dimension counts bytes where the rule wants it to.
Dims in_bytes(const TensorRule& rule, DataType type, Dims dims) {
    const bool of_words = rule.element == Element::kBytes && type == DataType::kINT32;
    if (of_words && dims.nbDims > 0) dims.d[dims.nbDims - 1] *= 4;
    return dims;
}

// Takes a tensor's sizes over, or finds that they contradict those of the tensors before it.
bool bind_dims(const char* operator_name, const TensorRule& rule, const Dims& given, Sizes& sizes) {
    const Shape shape = parse(rule.dims);
    if (given.nbDims != shape.rank) {
        report_error(operator_name, "%s must be [%s], but has %d dimensions", rule.name, rule.dims,
                     given.nbDims);
        return false;
    }
    for (int axis = 0; axis < shape.rank; ++axis) {
        const Dimension& dimension = shape.of[axis];
        std::int64_t wanted = dimension.size;
        if (dimension.letter != 0) {
            if (sizes[dimension.letter] == Sizes::kUnknown) sizes[dimension.letter] = given.d[axis];
            wanted = sizes[dimension.letter];
        }
        if (given.d[axis] != wanted) {
            report_error(operator_name, "%s must be [%s], but its dimension %d is %lld instead of %lld",
                         rule.name, rule.dims, axis, static_cast<long long>(given.d[axis]),
                         static_cast<long long>(wanted));
            return false;
        }
    }
    return true;
}

}  // namespace

DataType Signature::type_of(Element element, DataType cache_type) const noexcept {
    switch (element) {
        case Element::kFloat32:
            return DataType::kFLOAT;
        case Element::kInt32:
            return DataType::kINT32;
        case Element::kInt64:
            return DataType::kINT64;
        case Element::kShapeOnly:
        case Element::kBytes:
            return DataType::kINT8;
        case Element::kCache:
            break;
    }
    return cache_type;
}

bool Signature::takes(Element element, DataType type, DataType cache_type) const noexcept {
    const bool of_several = element == Element::kShapeOnly || element == Element::kBytes;
    if (of_several && type == DataType::kINT32) return true;
    return type == type_of(element, cache_type);
}

bool Signature::is_cache_type(DataType type) const noexcept {
    return type == DataType::kHALF || type == DataType::kBF16 ||
           (takes_float32_cache && type == DataType::kFLOAT);
}

bool Signature::check_counts(int given_inputs, int given_outputs) const noexcept {
    if (given_inputs == input_count && given_outputs == output_count) return true;
    report_error(name, "has %d inputs and %d outputs, not %d and %d", input_count, output_count, given_inputs,
                 given_outputs);
    return false;
}

bool Signature::output_shapes(const nvinfer1::DimsExprs* given, nvinfer1::DimsExprs* shapes,
                              nvinfer1::IExprBuilder& builder) const noexcept {
    const nvinfer1::IDimensionExpr* expressions[26] = {};
    for (int input = 0; input < input_count; ++input) {
        const Shape shape = parse(inputs[input].dims);
        if (given[input].nbDims != shape.rank) {
            report_error(name, "%s must be [%s], but has %d dimensions", inputs[input].name,
                         inputs[input].dims, given[input].nbDims);
            return false;
        }
        for (int axis = 0; axis < shape.rank; ++axis) {
            const char letter = shape.of[axis].letter;
            if (letter != 0 && expressions[letter - 'A'] == nullptr) {
                expressions[letter - 'A'] = given[input].d[axis];
            }
        }
    }
    for (int output = 0; output < output_count; ++output) {
        const Shape shape = parse(outputs[output].dims);
        shapes[output].nbDims = shape.rank;
        for (int axis = 0; axis < shape.rank; ++axis) {
            const Dimension& dimension = shape.of[axis];
            shapes[output].d[axis] = dimension.letter != 0 ? expressions[dimension.letter - 'A']
                                                           : builder.constant(dimension.size);
        }
    }
    return true;
}

bool Signature::bind(const PluginTensorDesc* given_inputs, const PluginTensorDesc* given_outputs,
                     Sizes& sizes) const noexcept {
    const DataType cache_type = given_inputs[0].type;
    if (!is_cache_type(cache_type)) {
        report_error(name, "%s must be %sfloat16 or bfloat16, not %s", inputs[0].name,
                     takes_float32_cache ? "float32, " : "", type_name(cache_type));
        return false;
    }
    for (int position = 0; position < input_count + output_count; ++position) {
        const TensorRule& rule = tensor(position);
        const PluginTensorDesc& given =
            position < input_count ? given_inputs[position] : given_outputs[position - input_count];
        const auto type_at = [&](int input) { return given_inputs[input].type; };
        if (!takes_at(position, given.type, type_at)) {
            const bool as_input = rule.element == Element::kBytes && rule.aliased_input >= 0;
            report_error(
                name, "%s must be %s, not %s", rule.name,
                type_name(as_input ? type_at(rule.aliased_input) : type_of(rule.element, cache_type)),
                type_name(given.type));
            return false;
        }
        if (!bind_dims(name, rule, in_bytes(rule, given.type, given.dims), sizes)) return false;
    }
    return true;
}

Sizes Signature::largest(const nvinfer1::DynamicPluginTensorDesc* given_inputs) const noexcept {
    Sizes sizes;
    for (int input = 0; input < input_count; ++input) {
        const Shape shape = parse(inputs[input].dims);
        const Dims most = in_bytes(inputs[input], given_inputs[input].desc.type, given_inputs[input].max);
        for (int axis = 0; axis < std::min(shape.rank, most.nbDims); ++axis) {
            const char letter = shape.of[axis].letter;
            if (letter != 0) sizes[letter] = std::max(sizes[letter], most.d[axis]);
        }
    }
    return sizes;
}

std::size_t byte_count(const PluginTensorDesc& tensor) noexcept {
    const bool two_bytes = tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
    std::size_t bytes = tensor.type == DataType::kINT8 ? 1 : two_bytes ? 2 : 4;
    for (int axis = 0; axis < tensor.dims.nbDims; ++axis)
        bytes *= static_cast<std::size_t>(tensor.dims.d[axis]);
    return bytes;
}

}  // namespace starkv::trt
