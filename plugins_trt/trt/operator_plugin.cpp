// SPDX-License-Identifier: Apache-2.0

#include "operator_plugin.h"

#include "logging.h"
#include "starkv_kernels.h"

namespace starkv::trt {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

namespace {

// TensorRT's convention for std::int32_t results.
constexpr std::int32_t kSuccess = 0;
constexpr std::int32_t kFailure = 1;

}  // namespace

nvinfer1::IPluginCapability* OperatorPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

std::int32_t OperatorPlugin::getOutputDataTypes(DataType* output_types, std::int32_t output_count,
                                                const DataType* input_types,
                                                std::int32_t input_count) const noexcept {
    if (!signature_.check_counts(input_count, output_count)) return kFailure;
    for (std::int32_t output = 0; output < output_count; ++output) {
        const TensorRule& rule = signature_.outputs[output];
        const bool as_input = rule.element == Element::kBytes && rule.aliased_input >= 0;
        output_types[output] =
            as_input ? input_types[rule.aliased_input] : signature_.type_of(rule.element, input_types[0]);
    }
    return kSuccess;
}

std::int32_t OperatorPlugin::getOutputShapes(const DimsExprs* inputs, std::int32_t input_count,
                                             const DimsExprs* /*shape_inputs*/,
                                             std::int32_t /*shape_input_count*/, DimsExprs* outputs,
                                             std::int32_t output_count,
                                             nvinfer1::IExprBuilder& builder) noexcept {
    if (!signature_.check_counts(input_count, output_count)) return kFailure;
    return signature_.output_shapes(inputs, outputs, builder) ? kSuccess : kFailure;
}

bool OperatorPlugin::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* tensors,
                                               std::int32_t input_count, std::int32_t output_count) noexcept {
    if (!signature_.check_counts(input_count, output_count)) return false;
    if (position < 0 || position >= input_count + output_count) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (position == 0) return signature_.is_cache_type(tensor.type);
    return signature_.takes_at(position, tensor.type, [&](int input) { return tensors[input].desc.type; });
}

std::int32_t OperatorPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                             const DynamicPluginTensorDesc* /*outputs*/,
                                             std::int32_t output_count) noexcept {
    if (!signature_.check_counts(input_count, output_count)) return kFailure;
    // Whatever the kernels refuse is better refused now than in the middle of a conversation.
    const Sizes sizes = signature_.largest(inputs);
    if (!fits_attributes(sizes)) return kFailure;
    std::size_t bytes = 0;
    const int status = most_workspace_bytes(sizes, inputs[0].desc.type, &bytes);
    if (status == STARKV_OK) return kSuccess;
    report_status(signature_.name, status);
    return kFailure;
}

std::size_t OperatorPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                             const DynamicPluginTensorDesc* /*outputs*/,
                                             std::int32_t output_count) const noexcept {
    if (!signature_.check_counts(input_count, output_count)) return 0;
    std::size_t bytes = 0;
    const int status = most_workspace_bytes(signature_.largest(inputs), inputs[0].desc.type, &bytes);
    if (status == STARKV_OK) return bytes;
    report_status(signature_.name, status);
    return 0;
}

std::int32_t OperatorPlugin::getAliasedInput(std::int32_t output) noexcept {
    const bool exists = output >= 0 && output < signature_.output_count;
    return exists ? signature_.outputs[output].aliased_input : -1;
}

const char* OperatorPlugin::getMetadataString() noexcept { return starkv_device_kind(); }

nvinfer1::IPluginV3* OperatorPlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept {
    return clone();
}

std::int32_t OperatorPlugin::onShapeChange(const PluginTensorDesc* inputs, std::int32_t input_count,
                                           const PluginTensorDesc* outputs,
                                           std::int32_t output_count) noexcept {
    if (!signature_.check_counts(input_count, output_count)) return kFailure;
    Sizes sizes;
    std::size_t bytes = 0;
    return prepare(inputs, outputs, sizes, bytes) ? kSuccess : kFailure;
}

std::int32_t OperatorPlugin::enqueue(const PluginTensorDesc* input_descs,
                                     const PluginTensorDesc* output_descs, const void* const* inputs,
                                     void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    // Worked out anew rather than kept from onShapeChange: it takes less than a microsecond, and no state can
    // be stale.
    Call call{{}, input_descs[0].type, output_descs, inputs, outputs, workspace, 0, stream};
    if (!prepare(input_descs, output_descs, call.sizes, call.workspace_bytes)) return kFailure;
    const int status = launch(call);
    if (status == STARKV_OK) return kSuccess;
    report_status(signature_.name, status);
    return kFailure;
}

bool OperatorPlugin::prepare(const PluginTensorDesc* inputs, const PluginTensorDesc* outputs, Sizes& sizes,
                             std::size_t& bytes) const noexcept {
    if (!signature_.bind(inputs, outputs, sizes) || !fits_attributes(sizes) || !fits_call(sizes))
        return false;
    const int status = workspace_bytes(sizes, inputs[0].type, &bytes);
    if (status != STARKV_OK) report_status(signature_.name, status);
    return status == STARKV_OK;
}

int kernel_type(DataType type) noexcept {
    switch (type) {
        case DataType::kFLOAT:
            return STARKV_FLOAT32;
        case DataType::kHALF:
            return STARKV_FLOAT16;
        case DataType::kBF16:
            return STARKV_BFLOAT16;
        default:
            return -1;  // The kernels refuse it.
    }
}

}  // namespace starkv::trt
