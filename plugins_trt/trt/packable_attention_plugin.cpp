// SPDX-License-Identifier: Apache-2.0

#include "packable_attention_plugin.h"

#include <algorithm>
#include <new>

#include "device_copy.h"
#include "logging.h"

namespace starkv::trt {

namespace {

constexpr const char* kName = "PackableKVAttention";

enum Input {
    kQ,
    kK,
    kV,
    kPastK,
    kPastV,
    kKvLen,
    kPastExtent,
    kPastKCodes,
    kPastVCodes,
    kPositions,
    kKScale,
    kVScale,
    kKBias,
    kVBias,
    kCosTable,
    kSinTable,
    kInputCount
};

enum Output { kOut, kPresentK, kPresentV, kPresentKCodes, kPresentVCodes, kOutputCount };

// B sequences, S new tokens, G KV heads, D head dim, C rows of capacity of the floats, K of the codes, R
// bytes of a row of codes, P rows of the tables; Q is query heads * D, N is G * D, H is D / 2, E may be 0.
// past_extent is as in KVAttention, codes are carried as in QuantizedKVAttention.
constexpr TensorRule kInputs[kInputCount] = {
    {"q", Element::kCache, "B S Q"},
    {"k", Element::kCache, "B S N"},
    {"v", Element::kCache, "B S N"},
    {"past_k", Element::kCache, "B G C D"},
    {"past_v", Element::kCache, "B G C D"},
    {"kv_len", Element::kInt32, "B"},
    {"past_extent", Element::kShapeOnly, "E"},
    {"past_k_codes", Element::kBytes, "B G K R"},
    {"past_v_codes", Element::kBytes, "B G K R"},
    {"positions", Element::kInt32, "B K 3"},
    {"k_scale", Element::kFloat32, "N"},
    {"v_scale", Element::kFloat32, "N"},
    {"k_bias", Element::kFloat32, "N"},
    {"v_bias", Element::kFloat32, "N"},
    {"cos_table", Element::kFloat32, "P H"},
    {"sin_table", Element::kFloat32, "P H"},
};

constexpr TensorRule kOutputs[kOutputCount] = {
    {"out", Element::kCache, "B S Q"},
    {"present_k", Element::kCache, "B G C D", kPastK},
    {"present_v", Element::kCache, "B G C D", kPastV},
    {"present_k_codes", Element::kBytes, "B G K R", kPastKCodes},
    {"present_v_codes", Element::kBytes, "B G K R", kPastVCodes},
};

constexpr Signature kSignature{kName, kInputs, kInputCount, kOutputs, kOutputCount, false};

// A cache of one row is none: profiles have no smaller ones.
bool has_codes(const Sizes& sizes) { return sizes.get('K') > 1; }

// Leaves a cache alone that a call does not work on; whether that was accepted.
bool pass_on(const OperatorPlugin::Call& call, Output present) {
    const void* const past = call.inputs[kOutputs[present].aliased_input];
    return call.outputs[present] == past ||
           copy_on_stream(call.outputs[present], past, byte_count(call.output_descs[present]), call.stream);
}

}  // namespace

const Signature& PackableAttentionPlugin::operator_signature() noexcept { return kSignature; }

PackableAttentionPlugin* PackableAttentionPlugin::create(
    const nvinfer1::PluginFieldCollection* fields) noexcept {
    Attributes given;
    return read_attributes(kName, fields, given) ? new (std::nothrow) PackableAttentionPlugin(given)
                                                 : nullptr;
}

PackableAttentionPlugin::PackableAttentionPlugin(const Attributes& given) noexcept
    : CodedAttentionPlugin(
          kSignature, {'K', kPastKCodes, kPastVCodes, kKvLen, kPositions, kPresentKCodes, kPresentVCodes},
          given) {}

nvinfer1::IPluginV3* PackableAttentionPlugin::clone() noexcept {
    return new (std::nothrow) PackableAttentionPlugin(given_);
}

bool PackableAttentionPlugin::fits_attributes(const Sizes& sizes) const noexcept {
    if (!CodedAttentionPlugin::fits_attributes(sizes)) return false;
    if (sizes.get('D') == 2 * sizes.get('H')) return true;
    report_error(kName, "past_k's rows have %d numbers, and cos_table's %d instead of half of that",
                 sizes.get('D'), sizes.get('H'));
    return false;
}

bool PackableAttentionPlugin::fits_call(const Sizes& sizes) const noexcept {
    if (!has_codes(sizes) || sizes.get('S') == 1) return true;
    report_error(kName,
                 "a cache of codes takes one new token, not %d; a prompt goes to the cache of floats, with a "
                 "cache of codes of one row, not %d",
                 sizes.get('S'), sizes.get('K'));
    return false;
}

int PackableAttentionPlugin::workspace_bytes(const Sizes& sizes, nvinfer1::DataType cache_type,
                                             std::size_t* bytes) const noexcept {
    return has_codes(sizes) ? coded_workspace(sizes, cache_type, bytes)
                            : float_attention_workspace(given_.heads, sizes, cache_type, bytes);
}

int PackableAttentionPlugin::most_workspace_bytes(const Sizes& largest, nvinfer1::DataType cache_type,
                                                  std::size_t* bytes) const noexcept {
    const int status = most_float_attention_workspace(given_.heads, largest, cache_type, bytes);
    if (status != STARKV_OK || !has_codes(largest)) return status;
    std::size_t over_codes = 0;
    const int other_status = most_coded_workspace(largest, cache_type, &over_codes);
    *bytes = std::max(*bytes, over_codes);
    return other_status;
}

int PackableAttentionPlugin::launch(const Call& call) const noexcept {
    if (has_codes(call.sizes)) {
        const bool passed = pass_on(call, kPresentK) && pass_on(call, kPresentV);
        return passed ? launch_over_codes(call) : STARKV_ERROR_LAUNCH;
    }
    const bool passed = pass_on(call, kPresentKCodes) && pass_on(call, kPresentVCodes);
    return passed ? launch_float_attention(given_.heads, call) : STARKV_ERROR_LAUNCH;
}

}  // namespace starkv::trt
