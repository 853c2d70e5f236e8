// SPDX-License-Identifier: Apache-2.0
// The plugins run on cases whose results are known without a reference. They prove that the right tensor
// arrives at the right place; tests/test_plugins_trt.py compares random cases with PyTorch.
#pragma once

#include "operator_run.h"

namespace starkv::tests {

void check_attention_runs(PluginLibrary& library, Memory& memory);
void check_full_attention_runs(PluginLibrary& library, Memory& memory);
void check_quantized_attention_runs(PluginLibrary& library, Memory& memory);
void check_packable_attention_runs(PluginLibrary& library, Memory& memory);
void check_compress_runs(PluginLibrary& library, Memory& memory);

}  // namespace starkv::tests
