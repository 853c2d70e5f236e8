// SPDX-License-Identifier: Apache-2.0

#include "harness_workspace.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "starkv_kernels.h"
#include "tensor_specs.h"

namespace starkv::tests {

namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;

// What a plugin asks for where these are a profile's largest sizes. The others must not matter.
std::size_t reserved(const PluginHandle& plugin, const OperatorSpec& largest) {
    std::vector<DynamicPluginTensorDesc> inputs = describe_fixed(largest.inputs);
    const std::vector<DynamicPluginTensorDesc> outputs = describe_fixed(largest.outputs);
    for (DynamicPluginTensorDesc& input : inputs) {
        for (std::int64_t& size : input.min.d) size = 1;
        for (std::int64_t& size : input.opt.d) size = 1;
        for (std::int64_t& size : input.desc.dims.d) size = -1;
    }
    return plugin.build()->getWorkspaceSize(inputs.data(), static_cast<int>(inputs.size()), outputs.data(),
                                            static_cast<int>(outputs.size()));
}

std::int32_t narrow(std::int64_t size) { return static_cast<std::int32_t>(size); }

// What the kernels need for one shape.
std::size_t needed(const CompressSizes& sizes) {
    const starkv_compress_shape shape{narrow(sizes.layers),
                                      narrow(sizes.sequences),
                                      narrow(sizes.kv_heads),
                                      narrow(sizes.query_heads),
                                      narrow(sizes.window),
                                      narrow(sizes.head_dim),
                                      narrow(sizes.capacity),
                                      narrow(sizes.slots),
                                      narrow(sizes.slot_capacity),
                                      narrow(sizes.pattern),
                                      STARKV_FLOAT16,
                                      STARKV_AVGPOOL,
                                      5};
    std::size_t bytes = 0;
    CHECK_EQUAL(starkv_compress_workspace(&shape, &bytes), STARKV_OK);
    return bytes;
}

std::size_t needed(const AttentionSizes& sizes) {
    const starkv_attention_shape shape{
        narrow(sizes.sequences), narrow(sizes.new_tokens), narrow(sizes.query_heads),
        narrow(sizes.kv_heads),  narrow(sizes.head_dim),   narrow(sizes.capacity),
        STARKV_FLOAT16};
    std::size_t bytes = 0;
    CHECK_EQUAL(starkv_attention_workspace(&shape, &bytes), STARKV_OK);
    return bytes;
}

std::size_t needed(const QuantizedSizes& sizes, std::int32_t type = STARKV_FLOAT32) {
    const std::int32_t pairs = narrow(sizes.head_dim / 2);
    const starkv_quantized_attention_shape shape{narrow(sizes.sequences),
                                                 narrow(sizes.query_heads),
                                                 narrow(sizes.kv_heads),
                                                 narrow(sizes.head_dim),
                                                 narrow(sizes.capacity),
                                                 narrow(sizes.table_rows),
                                                 narrow(sizes.bits),
                                                 type,
                                                 {pairs, 0, 0}};
    std::size_t bytes = 0;
    CHECK_EQUAL(starkv_quantized_attention_workspace(&shape, &bytes), STARKV_OK);
    return bytes;
}

}  // namespace

void check_compress_workspace(const PluginHandle& plugin) {
    CompressSizes largest;
    largest.layers = 28;
    largest.window = 32;
    largest.query_heads = 14;
    largest.capacity = 8192;
    largest.slot_capacity = 4096;
    const std::size_t bytes = reserved(plugin, compress_spec(largest, DataType::kHALF));
    CHECK(bytes >= needed(largest));
    CHECK(bytes > needed(CompressSizes()));
    // All combinations of sizes that are the largest, or an odd number less.
    using Size = std::int64_t CompressSizes::*;
    const std::vector<Size> sizes{&CompressSizes::layers, &CompressSizes::sequences,
                                  &CompressSizes::window, &CompressSizes::capacity,
                                  &CompressSizes::slots,  &CompressSizes::slot_capacity,
                                  &CompressSizes::pattern};
    for (unsigned smaller = 0; smaller < 1U << sizes.size(); ++smaller) {
        CompressSizes some = largest;
        for (std::size_t index = 0; index < sizes.size(); ++index) {
            if ((smaller >> index & 1U) != 0) some.*sizes[index] = (some.*sizes[index] - 1) / 2 + 1;
        }
        CHECK(needed(some) <= bytes);
    }
}

void check_attention_workspace(const PluginHandle& plugin) {
    AttentionSizes largest;
    largest.sequences = 96;
    largest.new_tokens = 2048;
    largest.capacity = 16384;
    const std::size_t bytes = reserved(plugin, attention_spec(largest, DataType::kHALF));
    CHECK(bytes > 0);
    AttentionSizes some = largest;
    for (const std::int64_t new_tokens : {1, 2, 100, 2048}) {
        for (const std::int64_t capacity : {64, 1000, 16384}) {
            for (std::int64_t sequences = 1; sequences <= largest.sequences; ++sequences) {
                some.new_tokens = new_tokens;
                some.capacity = capacity;
                some.sequences = sequences;
                CHECK(needed(some) <= bytes);
            }
        }
    }
}

void check_quantized_workspace(const PluginHandle& plugin, std::int64_t bits) {
    QuantizedSizes largest;
    largest.bits = bits;
    largest.sequences = 96;
    largest.capacity = 16384;
    largest.table_rows = 512;
    const std::size_t bytes = reserved(plugin, quantized_spec(largest, DataType::kFLOAT));
    CHECK(bytes > 0);
    QuantizedSizes some = largest;
    for (const std::int64_t table_rows : {1, 512}) {
        for (const std::int64_t capacity : {64, 1000, 16384}) {
            for (std::int64_t sequences = 1; sequences <= largest.sequences; ++sequences) {
                some.table_rows = table_rows;
                some.capacity = capacity;
                some.sequences = sequences;
                CHECK(needed(some) <= bytes);
            }
        }
    }
}

void check_packable_workspace(const PluginHandle& plugin) {
    PackableSizes largest;
    largest.floats.sequences = largest.codes.sequences = 24;
    largest.floats.new_tokens = 2048;
    largest.floats.capacity = 16384;
    largest.codes.capacity = 1;
    largest.codes.table_rows = 512;
    const std::size_t of_prompts = reserved(plugin, packable_spec(largest, DataType::kHALF));
    largest.floats.new_tokens = 1;
    largest.codes.capacity = 16384;
    const std::size_t of_replies = reserved(plugin, packable_spec(largest, DataType::kHALF));
    std::size_t over_floats = 0, over_codes = 0;
    PackableSizes some = largest;
    for (std::int64_t sequences = 1; sequences <= 24; ++sequences) {
        some.floats.sequences = some.codes.sequences = sequences;
        for (const std::int64_t new_tokens : {1, 100, 2048}) {
            some.floats.new_tokens = new_tokens;
            over_floats = std::max(over_floats, needed(some.floats));
        }
        for (const std::int64_t capacity : {64, 1000, 16384}) {
            some.codes.capacity = capacity;
            over_codes = std::max(over_codes, needed(some.codes, STARKV_FLOAT16));
        }
    }
    // Nothing for codes where a profile has none. A single token over floats needs the most of all lengths.
    CHECK_EQUAL(of_prompts, over_floats);
    CHECK_EQUAL(of_replies, std::max(over_floats, over_codes));
}

}  // namespace starkv::tests
