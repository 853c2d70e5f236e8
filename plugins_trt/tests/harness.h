// SPDX-License-Identifier: Apache-2.0
// The parts of the harness. Each reports its failures through check.h.
#pragma once

#include "plugin_library.h"
#include "tensor_specs.h"

namespace starkv::tests {

// Creators and attributes.
void check_fields(PluginLibrary& library);

// A creator of each operator.
struct Creators {
    nvinfer1::IPluginCreatorV3One &compress, &kv_attention, &full_attention, &quantized_attention,
        &packable_attention;
};

// What TensorRT asks while it builds an engine.
void check_build(const Creators& creators);

// What plugins refuse, and how they report it. Nothing is launched, so that no GPU is needed.
void check_errors(PluginLibrary& library);

// Loads a plugin library through the registry of a TensorRT library.
void check_registry(const std::string& plugin_library, const std::string& tensorrt_library);

}  // namespace starkv::tests
