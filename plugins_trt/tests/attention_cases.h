// SPDX-License-Identifier: Apache-2.0
// Cases of attention whose results are known without a reference, for every operator that does the same work.
#pragma once

#include "operator_run.h"

namespace starkv::tests {

// A call of KVAttention.
OperatorRun attention_case(const AttentionSizes& sizes, nvinfer1::DataType type);
// Checks its outputs, given the values that the cache held before.
void check_attention_result(const AttentionSizes& sizes, const OperatorRun& run, const HostTensor& past_v);

// A call of QuantizedKVAttention.
OperatorRun quantized_case(const QuantizedSizes& sizes, nvinfer1::DataType type);
void check_quantized_result(const QuantizedSizes& sizes, OperatorRun& run);

}  // namespace starkv::tests
