// SPDX-License-Identifier: Apache-2.0

#include "operator_run.h"

namespace starkv::tests {

OperatorRun::OperatorRun(const OperatorSpec& operator_spec) : spec(operator_spec) {
    for (const TensorSpec& tensor : spec.inputs) inputs.emplace_back(tensor);
    for (const TensorSpec& tensor : spec.outputs) outputs.emplace_back(tensor);
}

int OperatorRun::run(const PluginHandle& plugin, Memory& memory, Aliasing aliasing) {
    std::vector<void*> input_addresses, output_addresses;
    for (const HostTensor& input : inputs) {
        const bool first = input_addresses.empty();
        auto* block = static_cast<unsigned char*>(memory.allocate(input.byte_count() + misalignment));
        input_addresses.push_back(block + (first ? misalignment : 0));
        memory.upload(input_addresses.back(), input.data(), input.byte_count());
    }
    for (std::size_t output = 0; output < outputs.size(); ++output) {
        const int alias = aliasing == Aliasing::kShared ? spec.aliases[output] : -1;
        if (alias >= 0) {
            output_addresses.push_back(input_addresses[static_cast<std::size_t>(alias)]);
            continue;
        }
        output_addresses.push_back(memory.allocate(outputs[output].byte_count()));
        // Memory that nobody cleared.
        const std::vector<unsigned char> garbage(outputs[output].byte_count(), 0xA5);
        memory.upload(output_addresses.back(), garbage.data(), garbage.size());
    }
    const auto dynamic_inputs = describe_fixed(spec.inputs), dynamic_outputs = describe_fixed(spec.outputs);
    const auto input_descs = describe(spec.inputs), output_descs = describe(spec.outputs);
    const std::size_t workspace_bytes =
        plugin.build()->getWorkspaceSize(dynamic_inputs.data(), static_cast<int>(spec.inputs.size()),
                                         dynamic_outputs.data(), static_cast<int>(spec.outputs.size()));
    void* workspace = memory.allocate(workspace_bytes);
    const std::vector<const void*> read_only(input_addresses.begin(), input_addresses.end());
    const int result = plugin.runtime()->enqueue(input_descs.data(), output_descs.data(), read_only.data(),
                                                 output_addresses.data(), workspace, memory.stream());
    for (std::size_t input = 0; input < inputs.size(); ++input) {
        memory.download(inputs[input].data(), input_addresses[input], inputs[input].byte_count());
    }
    for (std::size_t output = 0; output < outputs.size(); ++output) {
        memory.download(outputs[output].data(), output_addresses[output], outputs[output].byte_count());
    }
    return result;
}

}  // namespace starkv::tests
