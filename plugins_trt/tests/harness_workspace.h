// SPDX-License-Identifier: Apache-2.0
// Whether the workspace that TensorRT reserves for a profile's largest sizes is enough for all smaller ones.
#pragma once

#include <cstdint>

#include "plugin_library.h"

namespace starkv::tests {

void check_compress_workspace(const PluginHandle& plugin);
void check_attention_workspace(const PluginHandle& plugin);
void check_quantized_workspace(const PluginHandle& plugin, std::int64_t bits);
void check_packable_workspace(const PluginHandle& plugin);

}  // namespace starkv::tests
