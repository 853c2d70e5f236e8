// SPDX-License-Identifier: Apache-2.0

#include <cmath>

#include "attention_cases.h"
#include "check.h"
#include "enqueue_checks.h"

namespace starkv::tests {

namespace {

using nvinfer1::DataType;

enum Input { kQ, kK, kV, kPastK, kPastV, kKvLen };
enum Output { kOut, kPresentK, kPresentV };

// The third cache has no room for three more rows.
constexpr std::int64_t kRowsHeld[] = {5, 0, 14};
constexpr std::int64_t kPointedRow = 2;
// Keys and queries of this size, along one dimension, leave other rows no attention: exp(-16 * 16 / 8).
constexpr double kLoud = 16.0;

// What a query head should see.
double expected(const AttentionSizes& sizes, std::int64_t b, std::int64_t token, std::int64_t head) {
    if (kRowsHeld[b] + sizes.new_tokens > sizes.capacity) return 0.0;
    const bool points = b == 0 && head >= sizes.query_heads / sizes.kv_heads;
    return points ? static_cast<double>(kPointedRow) : static_cast<double>(kRowsHeld[b] + token) / 2;
}

}  // namespace

// The value of row r is r everywhere, and keys are 0: a query sees the average of its rows. Only in the first
// sequence's second KV head one row has a key, which takes all attention.
OperatorRun attention_case(const AttentionSizes& sizes, DataType type) {
    OperatorRun run(attention_spec(sizes, type));
    for (std::int64_t b = 0; b < sizes.sequences; ++b) {
        run.inputs[kKvLen].set({b}, static_cast<double>(kRowsHeld[b]));
        for (std::int64_t head = 0; head < sizes.kv_heads; ++head) {
            for (std::int64_t row = 0; row < sizes.capacity; ++row) {
                run.inputs[kPastV].fill({b, head, row}, static_cast<double>(row));
            }
        }
        for (std::int64_t token = 0; token < sizes.new_tokens; ++token) {
            run.inputs[kV].fill({b, token}, static_cast<double>(kRowsHeld[b] + token));
            for (std::int64_t head = 0; head < sizes.query_heads; ++head) {
                run.inputs[kQ].set({b, token, head * sizes.head_dim}, kLoud);
            }
        }
    }
    run.inputs[kPastK].set({0, 1, kPointedRow, 0}, kLoud);
    // Rows that are not held yet: whatever they hold is never seen.
    for (std::int64_t head = 0; head < sizes.kv_heads; ++head) {
        for (std::int64_t row = kRowsHeld[0]; row < sizes.capacity; ++row) {
            run.inputs[kPastV].fill({0, head, row}, 240.0);
        }
    }
    return run;
}

void check_attention_result(const AttentionSizes& sizes, const OperatorRun& run, const HostTensor& past_v) {
    constexpr double kTolerance = 0.02;
    for (std::int64_t b = 0; b < sizes.sequences; ++b) {
        for (std::int64_t token = 0; token < sizes.new_tokens; ++token) {
            for (std::int64_t head = 0; head < sizes.query_heads; ++head) {
                for (const std::int64_t dim : {std::int64_t{0}, sizes.head_dim - 1}) {
                    const double seen = run.outputs[kOut].get({b, token, head * sizes.head_dim + dim});
                    CHECK(std::abs(seen - expected(sizes, b, token, head)) <= kTolerance);
                }
            }
        }
        // New rows hold their own number, others what they held.
        for (std::int64_t head = 0; head < sizes.kv_heads; ++head) {
            for (std::int64_t row = 0; row < sizes.capacity; ++row) {
                const bool fits = kRowsHeld[b] + sizes.new_tokens <= sizes.capacity;
                const bool is_new = fits && row >= kRowsHeld[b] && row < kRowsHeld[b] + sizes.new_tokens;
                const double wanted = is_new ? static_cast<double>(row) : past_v.get({b, head, row, 0});
                CHECK_EQUAL(run.outputs[kPresentV].get({b, head, row, 0}), wanted);
                CHECK_EQUAL(run.outputs[kPresentV].get({b, head, row, sizes.head_dim - 1}), wanted);
            }
        }
    }
    CHECK_EQUAL(run.outputs[kPresentK].get({0, 1, kPointedRow, 0}), kLoud);
}

void check_attention_runs(PluginLibrary& library, Memory& memory) {
    AttentionSizes sizes;
    Fields fields = attention_fields(sizes);
    const PluginHandle plugin(
        library.creator("KVAttention")
            ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
    REQUIRE(plugin);
    for (const DataType type : {DataType::kHALF, DataType::kBF16}) {
        for (const Aliasing aliasing : {Aliasing::kShared, Aliasing::kApart}) {
            // As an engine has it, which passes the lengths a second time.
            sizes.past_extent_type = aliasing == Aliasing::kShared ? DataType::kINT32 : DataType::kINT8;
            OperatorRun run = attention_case(sizes, type);
            const HostTensor past_v = run.inputs[kPastV];
            CHECK_EQUAL(run.run(plugin, memory, aliasing), 0);
            CHECK_EQUAL(library.log().take(), "");
            check_attention_result(sizes, run, past_v);
            if (aliasing == Aliasing::kApart) {
                CHECK_EQUAL(run.inputs[kPastV].get({0, 0, kRowsHeld[0], 0}), 240.0);
            }
        }
    }
}

}  // namespace starkv::tests
