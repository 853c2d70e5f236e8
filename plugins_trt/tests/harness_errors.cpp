// SPDX-License-Identifier: Apache-2.0
// Calls that cannot be run: enqueue and onShapeChange return an error and say why.

#include <functional>

#include "check.h"
#include "harness.h"
#include "operator_run.h"

namespace starkv::tests {

namespace {

using nvinfer1::DataType;

// Checks that enqueue, and unless it cannot know, onShapeChange refuse a call for a reason.
void check_refused(PluginLibrary& library, const PluginHandle& plugin, OperatorRun run, const char* reason) {
    HostMemory memory;
    library.log().take();
    // Apart, as an output of a wrong type may be larger than the input that it would share memory with.
    CHECK(run.run(plugin, memory, Aliasing::kApart) != 0);
    const std::string log = library.log().take();
    CHECK(log.find("starkv " + run.spec.name + ": ") != std::string::npos);
    if (log.find(reason) == std::string::npos)
        fail(__FILE__, __LINE__, log + " does not say '" + reason + "'");

    const bool shapes_are_wrong = run.misalignment == 0;
    const auto inputs = describe(run.spec.inputs), outputs = describe(run.spec.outputs);
    const int result = plugin.runtime()->onShapeChange(inputs.data(), static_cast<int>(inputs.size()),
                                                       outputs.data(), static_cast<int>(outputs.size()));
    CHECK_EQUAL(result != 0, shapes_are_wrong);
    CHECK_EQUAL(library.log().take().find(reason) != std::string::npos, shapes_are_wrong);
}

OperatorRun changed(const OperatorSpec& spec, const std::function<void(OperatorSpec&)>& change) {
    OperatorSpec other = spec;
    change(other);
    return OperatorRun(other);
}

void check_compress_errors(PluginLibrary& library) {
    const PluginHandle plugin(
        library.creator("KVCompress")->createPlugin("layer", nullptr, nvinfer1::TensorRTPhase::kRUNTIME));
    REQUIRE(plugin);
    const OperatorSpec spec = compress_spec({}, DataType::kHALF);
    const auto refused = [&](const std::function<void(OperatorSpec&)>& change, const char* reason) {
        check_refused(library, plugin, changed(spec, change), reason);
    };
    refused([](OperatorSpec& s) { s.inputs[5].shape.back() = 3; },
            "row_meta must be [L B C 4], but its dimension 3");
    refused([](OperatorSpec& s) { s.inputs[3].shape.back() = 4; },
            "hidden_norm must be [L B C], but its dimension 2");
    refused([](OperatorSpec& s) { s.inputs[0].shape.pop_back(); },
            "k must be [L B G C D], but has 4 dimensions");
    refused([](OperatorSpec& s) { s.inputs[7].shape = {22}; }, "parameters must be [23]");
    refused([](OperatorSpec& s) { s.inputs[3].type = DataType::kHALF; },
            "hidden_norm must be float32, not float16");
    refused([](OperatorSpec& s) { s.inputs[8].type = DataType::kINT32; }, "limits must be int64, not int32");
    refused([](OperatorSpec& s) { s.inputs[0].type = DataType::kINT8; },
            "k must be float32, float16 or bfloat16");
    refused([](OperatorSpec& s) { s.outputs[4].shape.back() = 4; }, "rows must be [L B 1 E]");
    CompressSizes odd;
    odd.head_dim = 72;
    check_refused(library, plugin, OperatorRun(compress_spec(odd, DataType::kHALF)), "STARKV_ERROR_HEAD_DIM");
    odd = CompressSizes();
    odd.window = 65;
    check_refused(library, plugin, OperatorRun(compress_spec(odd, DataType::kHALF)), "STARKV_ERROR_WINDOW");
    OperatorRun misaligned(spec);
    misaligned.misalignment = 8;
    check_refused(library, plugin, misaligned, "STARKV_ERROR_MISALIGNED");

    const auto inputs = describe(spec.inputs), outputs = describe(spec.outputs);
    CHECK(plugin.runtime()->onShapeChange(inputs.data(), 15, outputs.data(), 10) != 0);
    CHECK(library.log().take().find("has 16 inputs and 10 outputs, not 15 and 10") != std::string::npos);
}

void check_attention_errors(PluginLibrary& library) {
    Fields fields = attention_fields({});
    const PluginHandle plugin(
        library.creator("KVAttention")
            ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
    REQUIRE(plugin);
    const OperatorSpec spec = attention_spec({}, DataType::kBF16);
    const auto refused = [&](const std::function<void(OperatorSpec&)>& change, const char* reason) {
        check_refused(library, plugin, changed(spec, change), reason);
    };
    refused([](OperatorSpec& s) { s.inputs[5].shape = {2}; }, "kv_len must be [B]");
    refused([](OperatorSpec& s) { s.inputs[6].type = DataType::kINT64; },
            "past_extent must be int8, not int64");
    refused([](OperatorSpec& s) { s.inputs[0].type = DataType::kFLOAT; },
            "q must be float16 or bfloat16, not float32");
    AttentionSizes other;
    other.query_heads = 6;
    check_refused(library, plugin, OperatorRun(attention_spec(other, DataType::kBF16)), "num_heads 4");
    other = AttentionSizes();
    other.head_dim = 72;
    check_refused(library, plugin, OperatorRun(attention_spec(other, DataType::kBF16)),
                  "STARKV_ERROR_HEAD_DIM");
    OperatorRun misaligned(spec);
    misaligned.misalignment = 8;
    check_refused(library, plugin, misaligned, "STARKV_ERROR_MISALIGNED");
}

void check_full_attention_errors(PluginLibrary& library) {
    Fields fields = full_attention_fields({});
    const PluginHandle plugin(
        library.creator("FullAttention")
            ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
    REQUIRE(plugin);
    const OperatorSpec spec = full_attention_spec({}, DataType::kBF16);
    const auto refused = [&](const std::function<void(OperatorSpec&)>& change, const char* reason) {
        check_refused(library, plugin, changed(spec, change), reason);
    };
    refused([](OperatorSpec& s) { s.inputs[1].shape = {2, 6, 128}; }, "k must be [B N Q]");
    refused([](OperatorSpec& s) { s.inputs[2].type = DataType::kHALF; }, "v must be bfloat16, not float16");
    FullAttentionSizes other;
    other.head_dim = 72;
    check_refused(library, plugin, OperatorRun(full_attention_spec(other, DataType::kBF16)),
                  "STARKV_ERROR_HEAD_DIM");
    other = FullAttentionSizes();
    other.heads = 1;
    other.head_dim = 33;
    check_refused(library, plugin, OperatorRun(full_attention_spec(other, DataType::kBF16)),
                  "is no multiple of num_heads");
    OperatorRun misaligned(spec);
    misaligned.misalignment = 8;
    check_refused(library, plugin, misaligned, "STARKV_ERROR_MISALIGNED");
}

void check_quantized_attention_errors(PluginLibrary& library) {
    Fields fields = quantized_fields({});
    const PluginHandle plugin(
        library.creator("QuantizedKVAttention")
            ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
    REQUIRE(plugin);
    const OperatorSpec spec = quantized_spec({}, DataType::kBF16);
    const auto refused = [&](const std::function<void(OperatorSpec&)>& change, const char* reason) {
        check_refused(library, plugin, changed(spec, change), reason);
    };
    refused([](OperatorSpec& s) { s.inputs[0].shape[1] = 2; }, "q must be [B 1 Q], but its dimension 1 is 2");
    refused([](OperatorSpec& s) { s.inputs[6].shape.back() = 4; }, "positions must be [B C 3]");
    refused([](OperatorSpec& s) { s.inputs[3].type = DataType::kUINT8; },
            "past_k must be int8, not another type");
    refused([](OperatorSpec& s) { s.outputs[1].type = DataType::kINT32; },
            "present_k must be int8, not int32");
    // Words that are as many as bytes should be.
    refused([](OperatorSpec& s) { s.inputs[3].type = s.outputs[1].type = DataType::kINT32; },
            "past_v must be [B G C R], but its dimension 3 is 64 instead of 256");
    refused([](OperatorSpec& s) { s.inputs[7].type = DataType::kHALF; }, "k_scale must be float32");
    refused([](OperatorSpec& s) { s.inputs[12].shape[0] = 39; }, "sin_table must be [P H]");
    refused([](OperatorSpec& s) { s.inputs[11].shape[1] = s.inputs[12].shape[1] = 31; },
            "mrope_section has 32 pairs, but cos_table 31");
    QuantizedSizes other;
    other.query_heads = 6;
    check_refused(library, plugin, OperatorRun(quantized_spec(other, DataType::kBF16)), "num_heads 4");
    other = QuantizedSizes();
    other.bits = 4;
    check_refused(library, plugin, OperatorRun(quantized_spec(other, DataType::kBF16)), "bits 8 do not fit");
    OperatorRun misaligned(spec);
    misaligned.misalignment = 8;
    check_refused(library, plugin, misaligned, "STARKV_ERROR_MISALIGNED");
}

void check_packable_attention_errors(PluginLibrary& library) {
    PackableSizes sizes;
    sizes.codes.capacity = 1;
    Fields fields = quantized_fields(sizes.codes);
    const PluginHandle plugin(
        library.creator("PackableKVAttention")
            ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
    REQUIRE(plugin);
    const OperatorSpec spec = packable_spec(sizes, DataType::kBF16);
    const auto refused = [&](const std::function<void(OperatorSpec&)>& change, const char* reason) {
        check_refused(library, plugin, changed(spec, change), reason);
    };
    PackableSizes other;
    check_refused(library, plugin, OperatorRun(packable_spec(other, DataType::kBF16)),
                  "a cache of codes takes one new token, not 3; a prompt goes to the cache of floats, with a "
                  "cache of codes of one row, not 16");
    refused([](OperatorSpec& s) { s.inputs[9].shape[1] = 2; }, "positions must be [B K 3]");
    refused([](OperatorSpec& s) { s.inputs[8].type = s.outputs[4].type = DataType::kHALF; },
            "past_v_codes must be int8, not float16");
    refused([](OperatorSpec& s) { s.outputs[3].type = DataType::kINT32; },
            "present_k_codes must be int8, not int32");
    refused([](OperatorSpec& s) { s.outputs[1].shape[2] = 2; }, "present_k must be [B G C D]");
    refused(
        [](OperatorSpec& s) {
            for (const std::size_t input : {3, 4}) s.inputs[input].shape[3] = 80;
            for (const std::size_t output : {1, 2}) s.outputs[output].shape[3] = 80;
        },
        "past_k's rows have 80 numbers, and cos_table's 32 instead of half of that");
    other = sizes;
    other.codes.bits = 4;
    check_refused(library, plugin, OperatorRun(packable_spec(other, DataType::kBF16)), "bits 8 do not fit");
    // Either cache's kernels look at addresses.
    OperatorRun misaligned(spec);
    misaligned.misalignment = 8;
    check_refused(library, plugin, misaligned, "STARKV_ERROR_MISALIGNED");
    sizes.codes.capacity = 16;
    sizes.floats.new_tokens = 1;
    misaligned = OperatorRun(packable_spec(sizes, DataType::kBF16));
    misaligned.misalignment = 8;
    check_refused(library, plugin, misaligned, "STARKV_ERROR_MISALIGNED");
}

}  // namespace

void check_errors(PluginLibrary& library) {
    check_compress_errors(library);
    check_attention_errors(library);
    check_full_attention_errors(library);
    check_quantized_attention_errors(library);
    check_packable_attention_errors(library);
}

}  // namespace starkv::tests
