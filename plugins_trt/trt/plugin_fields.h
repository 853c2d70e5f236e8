// SPDX-License-Identifier: Apache-2.0
// An operator's attributes as TensorRT hands them to a plugin's creator.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <variant>

namespace starkv::trt {

// Where an attribute's value goes. A text lies in the field's own memory.
struct FieldTarget {
    const char* name;
    std::variant<std::int32_t*, std::string_view*> value;
    std::int32_t count = 1;  // of integers
};

// Reads a collection into its targets; those that it does not mention keep their values. Reports fields that
// no target has, or of another type, and returns whether there were none.
bool read_fields(const char* operator_name, const nvinfer1::PluginFieldCollection* collection,
                 std::initializer_list<FieldTarget> targets) noexcept;

}  // namespace starkv::trt
