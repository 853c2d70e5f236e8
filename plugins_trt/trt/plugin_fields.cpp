// SPDX-License-Identifier: Apache-2.0

#include "plugin_fields.h"

#include <algorithm>
#include <cstdio>

#include "logging.h"

namespace starkv::trt {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// Attributes of an ONNX node that address the plugin itself rather than say what it does.
bool addresses_the_plugin(std::string_view name) {
    constexpr std::string_view kNames[] = {"plugin_namespace", "plugin_version", "plugin_name",
                                           "tensorrt_plugin_shape_input_indices"};
    return std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

bool read_field(const char* operator_name, const PluginField& field, const FieldTarget& target) {
    if (const auto* integer = std::get_if<std::int32_t*>(&target.value)) {
        if (field.type != PluginFieldType::kINT32 || field.length != target.count || field.data == nullptr) {
            char wanted[16];
            std::snprintf(wanted, sizeof(wanted), target.count == 1 ? "one" : "%d", target.count);
            report_error(operator_name, "attribute %s must be %s INT32 (field type %d, length %d given)",
                         field.name, wanted, static_cast<int>(field.type), field.length);
            return false;
        }
        std::copy_n(static_cast<const std::int32_t*>(field.data), target.count, *integer);
        return true;
    }
    if (field.type != PluginFieldType::kCHAR || field.length < 1 || field.data == nullptr) {
        report_error(operator_name, "attribute %s must be a string (field type %d, length %d given)",
                     field.name, static_cast<int>(field.type), field.length);
        return false;
    }
    std::string_view text(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length));
    // Whether the length counts the terminating zero depends on who made the field.
    if (text.back() == '\0') text.remove_suffix(1);
    *std::get<std::string_view*>(target.value) = text;
    return true;
}

}  // namespace

bool read_fields(const char* operator_name, const nvinfer1::PluginFieldCollection* collection,
                 std::initializer_list<FieldTarget> targets) noexcept {
    if (collection == nullptr) return true;
    if (collection->nbFields < 0 || (collection->nbFields > 0 && collection->fields == nullptr)) {
        report_error(operator_name, "malformed collection of %d fields", collection->nbFields);
        return false;
    }
    bool all_read = true;
    for (std::int32_t index = 0; index < collection->nbFields; ++index) {
        const PluginField& field = collection->fields[index];
        const std::string_view name = field.name != nullptr ? field.name : "";
        if (addresses_the_plugin(name)) continue;
        const auto* target = std::find_if(targets.begin(), targets.end(), [&](const FieldTarget& candidate) {
            return name == candidate.name;
        });
        if (target == targets.end()) {
            report_error(operator_name, "unknown attribute '%s'", name.data());
            all_read = false;
        } else {
            all_read = read_field(operator_name, field, *target) && all_read;
        }
    }
    return all_read;
}

}  // namespace starkv::trt
