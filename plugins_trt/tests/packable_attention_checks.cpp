// SPDX-License-Identifier: Apache-2.0

#include <algorithm>

#include "attention_cases.h"
#include "check.h"
#include "enqueue_checks.h"

namespace starkv::tests {

namespace {

using nvinfer1::DataType;

enum Input { kQ, kK, kV, kPastK, kPastV, kKvLen, kPastExtent, kPastKCodes, kPastVCodes, kPositions };
enum Output { kOut, kPresentK, kPresentV, kPresentKCodes, kPresentVCodes };

// Of QuantizedKVAttention.
constexpr std::size_t kCodesPastK = 3, kCodesPastV = 4, kCodesPositions = 6;

// What a cache holds that a call does not work on.
constexpr unsigned char kOther = 0x5A;

void fill_with_other(HostTensor& cache) { std::fill_n(cache.data(), cache.byte_count(), kOther); }

void check_other(const HostTensor& cache) {
    CHECK(std::all_of(cache.data(), cache.data() + cache.byte_count(),
                      [](unsigned char byte) { return byte == kOther; }));
}

void run_and_check_log(OperatorRun& run, const PluginHandle& plugin, PluginLibrary& library, Memory& memory,
                       Aliasing aliasing) {
    CHECK_EQUAL(run.run(plugin, memory, aliasing), 0);
    CHECK_EQUAL(library.log().take(), "");
}

void check_over_floats(PackableSizes sizes, DataType type, const PluginHandle& plugin, PluginLibrary& library,
                       Memory& memory, Aliasing aliasing) {
    sizes.codes.capacity = 1;
    OperatorRun floats = attention_case(sizes.floats, type);
    OperatorRun run(packable_spec(sizes, type));
    std::copy(floats.inputs.begin(), floats.inputs.end(), run.inputs.begin());
    for (const Input cache : {kPastKCodes, kPastVCodes}) fill_with_other(run.inputs[cache]);
    run_and_check_log(run, plugin, library, memory, aliasing);
    const HostTensor past_v = floats.inputs[kPastV];
    floats.outputs.assign(run.outputs.begin(), run.outputs.begin() + kPresentKCodes);
    check_attention_result(sizes.floats, floats, past_v);
    for (const Output cache : {kPresentKCodes, kPresentVCodes}) check_other(run.outputs[cache]);
    for (const Input cache : {kPastKCodes, kPastVCodes}) check_other(run.inputs[cache]);
}

void check_over_codes(PackableSizes sizes, DataType type, const PluginHandle& plugin, PluginLibrary& library,
                      Memory& memory, Aliasing aliasing) {
    sizes.floats.new_tokens = 1;
    OperatorRun codes = quantized_case(sizes.codes, type);
    OperatorRun run(packable_spec(sizes, type));
    for (const Input input : {kQ, kK, kV, kKvLen}) run.inputs[input] = codes.inputs[input];
    run.inputs[kPastKCodes] = codes.inputs[kCodesPastK];
    run.inputs[kPastVCodes] = codes.inputs[kCodesPastV];
    std::copy(codes.inputs.begin() + kCodesPositions, codes.inputs.end(), run.inputs.begin() + kPositions);
    for (const Input cache : {kPastK, kPastV}) fill_with_other(run.inputs[cache]);
    run_and_check_log(run, plugin, library, memory, aliasing);
    codes.outputs = {run.outputs[kOut], run.outputs[kPresentKCodes], run.outputs[kPresentVCodes]};
    check_quantized_result(sizes.codes, codes);
    for (const Output cache : {kPresentK, kPresentV}) check_other(run.outputs[cache]);
    for (const Input cache : {kPastK, kPastV}) check_other(run.inputs[cache]);
}

}  // namespace

void check_packable_attention_runs(PluginLibrary& library, Memory& memory) {
    for (const std::int64_t bits : {8, 4}) {
        PackableSizes sizes;
        sizes.codes.bits = bits;
        Fields fields = quantized_fields(sizes.codes);
        const PluginHandle plugin(
            library.creator("PackableKVAttention")
                ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
        REQUIRE(plugin);
        for (const DataType type : {DataType::kHALF, DataType::kBF16}) {
            for (const Aliasing aliasing : {Aliasing::kShared, Aliasing::kApart}) {
                const bool shared = aliasing == Aliasing::kShared;
                sizes.codes.codes = shared ? DataType::kINT32 : DataType::kINT8;
                sizes.floats.past_extent_type = shared ? DataType::kINT32 : DataType::kINT8;
                check_over_floats(sizes, type, plugin, library, memory, aliasing);
                check_over_codes(sizes, type, plugin, library, memory, aliasing);
            }
        }
    }
}

}  // namespace starkv::tests
