// SPDX-License-Identifier: Apache-2.0
// One call of a plugin's enqueue, with the tensors on the host before and after it.
#pragma once

#include <vector>

#include "host_tensor.h"
#include "memory.h"
#include "plugin_library.h"

namespace starkv::tests {

// Whether outputs lie where the inputs do that they share memory with. TensorRT may copy instead.
enum class Aliasing { kShared, kApart };

struct OperatorRun {
    explicit OperatorRun(const OperatorSpec& operator_spec);

    // Result of enqueue. `inputs` become what they are afterwards, and `outputs` what was written.
    int run(const PluginHandle& plugin, Memory& memory, Aliasing aliasing);

    OperatorSpec spec;
    std::vector<HostTensor> inputs;
    std::vector<HostTensor> outputs;
    // Added to the address of the first input, to see whether it is noticed.
    std::size_t misalignment = 0;
};

}  // namespace starkv::tests
