// SPDX-License-Identifier: Apache-2.0
// Attributes for createPlugin, and what getFieldsToSerialize gave, as values.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace starkv::tests {

// Owns what its PluginFields point to, together with its copies.
class Fields {
public:
    Fields& add(const std::string& name, std::int32_t value) {
        integers_->push_back(value);
        return add_raw(name, &integers_->back(), nvinfer1::PluginFieldType::kINT32, 1);
    }
    Fields& add_list(const std::string& name, const std::vector<std::int32_t>& values) {
        lists_->push_back(values);
        return add_raw(name, lists_->back().data(), nvinfer1::PluginFieldType::kINT32,
                       static_cast<std::int32_t>(values.size()));
    }
    Fields& add(const std::string& name, const std::string& value) {
        texts_->push_back(value);
        return add_raw(name, texts_->back().data(), nvinfer1::PluginFieldType::kCHAR,
                       static_cast<std::int32_t>(value.size()));
    }
    Fields& add_raw(const std::string& name, const void* data, nvinfer1::PluginFieldType type,
                    std::int32_t length) {
        texts_->push_back(name);
        fields_.emplace_back(texts_->back().c_str(), data, type, length);
        return *this;
    }
    const nvinfer1::PluginFieldCollection* collection() {
        collection_.nbFields = static_cast<std::int32_t>(fields_.size());
        collection_.fields = fields_.data();
        return &collection_;
    }

private:
    // Deques, whose elements stay where they are when others are added.
    std::shared_ptr<std::deque<std::int32_t>> integers_ = std::make_shared<std::deque<std::int32_t>>();
    std::shared_ptr<std::deque<std::vector<std::int32_t>>> lists_ =
        std::make_shared<std::deque<std::vector<std::int32_t>>>();
    std::shared_ptr<std::deque<std::string>> texts_ = std::make_shared<std::deque<std::string>>();
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

// Name to value, integers as their digits, several with spaces between them.
inline std::map<std::string, std::string> values_of(const nvinfer1::PluginFieldCollection* collection) {
    std::map<std::string, std::string> values;
    for (std::int32_t index = 0; index < collection->nbFields; ++index) {
        const nvinfer1::PluginField& field = collection->fields[index];
        if (field.type == nvinfer1::PluginFieldType::kINT32) {
            std::string& digits = values[field.name];
            for (std::int32_t item = 0; item < field.length; ++item) {
                if (item > 0) digits += ' ';
                digits += std::to_string(static_cast<const std::int32_t*>(field.data)[item]);
            }
        } else {
            values[field.name] =
                std::string(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length));
        }
    }
    return values;
}

}  // namespace starkv::tests
