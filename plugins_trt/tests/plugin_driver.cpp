// SPDX-License-Identifier: Apache-2.0

#include "plugin_driver.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <vector>

#include "fields.h"
#include "plugin_library.h"

namespace starkv::tests {

namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int kFailed = 1;

// Each library is loaded once; its creators are the process's, as in TensorRT's registry.
PluginLibrary& load(const std::string& path) {
    static std::map<std::string, std::unique_ptr<PluginLibrary>> loaded;
    std::unique_ptr<PluginLibrary>& library = loaded[path];
    if (!library) library = std::make_unique<PluginLibrary>(path);
    return *library;
}

PluginHandle create(PluginLibrary& library, const std::string& operator_name, Fields fields) {
    nvinfer1::IPluginCreatorV3One* creator = library.creator(operator_name);
    if (creator == nullptr) throw std::runtime_error("no operator " + operator_name);
    PluginHandle plugin(
        creator->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
    if (!plugin) throw std::runtime_error(library.log().take());
    return plugin;
}

Fields fields_of(const starkv_driver_call& call) {
    Fields fields;
    for (int index = 0; index < call.field_count; ++index) {
        const starkv_driver_field& field = call.fields[index];
        if (field.text != nullptr) {
            fields.add(field.name, std::string(field.text));
        } else {
            fields.add_list(field.name,
                            std::vector<std::int32_t>(field.integers, field.integers + field.count));
        }
    }
    return fields;
}

constexpr std::size_t kDeviceBytes = 8;

void device(const char* plugin_library, char* name) {
    const PluginHandle plugin = create(load(plugin_library), "KVCompress", Fields());
    std::snprintf(name, kDeviceBytes, "%s", plugin.build()->getMetadataString());
}

std::vector<PluginTensorDesc> describe(const starkv_driver_tensor* tensors, int count) {
    std::vector<PluginTensorDesc> descs(static_cast<std::size_t>(count));
    for (int index = 0; index < count; ++index) {
        PluginTensorDesc& desc = descs[static_cast<std::size_t>(index)];
        desc.type = static_cast<nvinfer1::DataType>(tensors[index].type);
        desc.format = nvinfer1::TensorFormat::kLINEAR;
        desc.dims.nbDims = tensors[index].rank;
        std::copy_n(tensors[index].dims, nvinfer1::Dims::MAX_DIMS, desc.dims.d);
    }
    return descs;
}

std::vector<DynamicPluginTensorDesc> fixed(const std::vector<PluginTensorDesc>& descs) {
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (const PluginTensorDesc& desc : descs) dynamic.push_back({desc, desc.dims, desc.dims, desc.dims});
    return dynamic;
}

std::size_t workspace_bytes(const starkv_driver_call& call) {
    PluginLibrary& library = load(call.plugin_library);
    const PluginHandle plugin = create(library, call.operator_name, fields_of(call));
    const auto inputs = fixed(describe(call.inputs, call.input_count));
    const auto outputs = fixed(describe(call.outputs, call.output_count));
    if (plugin.build()->configurePlugin(inputs.data(), call.input_count, outputs.data(), call.output_count)) {
        throw std::runtime_error(library.log().take());
    }
    return plugin.build()->getWorkspaceSize(inputs.data(), call.input_count, outputs.data(),
                                            call.output_count);
}

void enqueue(const starkv_driver_call& call, void* workspace, void* stream) {
    PluginLibrary& library = load(call.plugin_library);
    const PluginHandle plugin = create(library, call.operator_name, fields_of(call));
    const PluginHandle attached(plugin.runtime()->attachToContext(nullptr));
    const auto inputs = describe(call.inputs, call.input_count);
    const auto outputs = describe(call.outputs, call.output_count);
    std::vector<const void*> input_addresses;
    std::vector<void*> output_addresses;
    for (int index = 0; index < call.input_count; ++index) input_addresses.push_back(call.inputs[index].data);
    for (int index = 0; index < call.output_count; ++index)
        output_addresses.push_back(call.outputs[index].data);
    if (attached.runtime()->onShapeChange(inputs.data(), call.input_count, outputs.data(),
                                          call.output_count) ||
        attached.runtime()->enqueue(inputs.data(), outputs.data(), input_addresses.data(),
                                    output_addresses.data(), workspace, static_cast<cudaStream_t>(stream))) {
        throw std::runtime_error(library.log().take());
    }
}

template <class Action>
int guarded(char* message, std::size_t message_bytes, const Action& action) {
    try {
        action();
        return 0;
    } catch (const std::exception& error) {
        std::snprintf(message, message_bytes, "%s", error.what());
        return kFailed;
    }
}

}  // namespace

}  // namespace starkv::tests

int starkv_driver_device(const char* plugin_library, char* device, char* message, size_t message_bytes) {
    return starkv::tests::guarded(message, message_bytes,
                                  [&] { starkv::tests::device(plugin_library, device); });
}

int starkv_driver_workspace(const starkv_driver_call* call, size_t* bytes, char* message,
                            size_t message_bytes) {
    return starkv::tests::guarded(message, message_bytes,
                                  [&] { *bytes = starkv::tests::workspace_bytes(*call); });
}

int starkv_driver_enqueue(const starkv_driver_call* call, void* workspace, void* stream, char* message,
                          size_t message_bytes) {
    return starkv::tests::guarded(message, message_bytes,
                                  [&] { starkv::tests::enqueue(*call, workspace, stream); });
}
