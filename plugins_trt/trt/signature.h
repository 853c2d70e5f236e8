// SPDX-License-Identifier: Apache-2.0
// An operator's tensors as a table, from which everything that TensorRT asks about them follows: supported
// types, output types and shapes, aliases, and whether the tensors of a call fit each other.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>

namespace starkv::trt {

enum class Element {
    kCache,  // the element type of the KV cache, the same for all such tensors of a call
    kFloat32,
    kInt32,
    kInt64,
    kShapeOnly,  // int8 or int32: only the shape counts, nobody reads the numbers
    // int8, or int32 that are four bytes each, for networks where int8 stands for quantized numbers only. The
    // last dimension's letter counts bytes. An output is of the same type as the input it aliases.
    kBytes,
};

struct TensorRule {
    const char* name;
    Element element;
    // A capital letter or a number for each dimension, such as "L B 4 C". A letter means the same size
    // wherever it stands.
    const char* dims;
    // Of an output: the input whose memory it shares, or -1.
    int aliased_input = -1;
};

// What the letters of TensorRule::dims stand for.
class Sizes {
public:
    static constexpr std::int64_t kUnknown = -1;

    Sizes() noexcept {
        for (std::int64_t& size : sizes_) size = kUnknown;
    }
    std::int64_t& operator[](char letter) noexcept { return sizes_[letter - 'A']; }
    // For the kernels, whose sizes are 32 bits wide. What does not fit becomes -1, which they refuse.
    std::int32_t get(char letter) const noexcept {
        const std::int64_t size = sizes_[letter - 'A'];
        return size <= INT32_MAX ? static_cast<std::int32_t>(size) : -1;
    }

private:
    std::int64_t sizes_[26];
};

struct Signature {
    const char* name;
    // The first input is one of the cache's element type: it decides for all of them.
    const TensorRule* inputs;
    int input_count;
    const TensorRule* outputs;
    int output_count;
    bool takes_float32_cache;

    const TensorRule& tensor(int position) const noexcept {
        return position < input_count ? inputs[position] : outputs[position - input_count];
    }
    // Of a tensor of several types: the narrowest.
    nvinfer1::DataType type_of(Element element, nvinfer1::DataType cache_type) const noexcept;
    bool takes(Element element, nvinfer1::DataType type, nvinfer1::DataType cache_type) const noexcept;
    bool is_cache_type(nvinfer1::DataType type) const noexcept;
    // Whether a tensor at a position, inputs before outputs, may have the type, given those before it.
    template <class TypeAt>
    bool takes_at(int position, nvinfer1::DataType type, const TypeAt& type_at) const noexcept {
        const TensorRule& rule = tensor(position);
        if (rule.element == Element::kBytes && rule.aliased_input >= 0)
            return type == type_at(rule.aliased_input);
        return takes(rule.element, type, type_at(0));
    }

    // Reports and returns false unless there are as many tensors as there should be.
    bool check_counts(int given_inputs, int given_outputs) const noexcept;

    // Reports and returns false unless the inputs have the right number of dimensions.
    bool output_shapes(const nvinfer1::DimsExprs* given, nvinfer1::DimsExprs* shapes,
                       nvinfer1::IExprBuilder& builder) const noexcept;

    // Sizes of a call's tensors. Reports and returns false unless their types and shapes fit each other.
    bool bind(const nvinfer1::PluginTensorDesc* given_inputs, const nvinfer1::PluginTensorDesc* given_outputs,
              Sizes& sizes) const noexcept;

    // The largest sizes within an optimization profile.
    Sizes largest(const nvinfer1::DynamicPluginTensorDesc* given_inputs) const noexcept;
};

// Bytes of a tensor of float32, half, bfloat16 or integers of 32 or 8 bits.
std::size_t byte_count(const nvinfer1::PluginTensorDesc& tensor) noexcept;

}  // namespace starkv::trt
