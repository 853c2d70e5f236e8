// SPDX-License-Identifier: Apache-2.0

#include <cmath>

#include "check.h"
#include "enqueue_checks.h"

namespace starkv::tests {

using nvinfer1::DataType;

// Values are the token's number and keys 0: every query sees the average. In the second head of the first
// sequence one token has a key, which takes all attention.
void check_full_attention_runs(PluginLibrary& library, Memory& memory) {
    constexpr std::int64_t kPointed = 3;
    constexpr double kLoud = 16.0, kTolerance = 0.02;
    enum Input { kQ, kK, kV };
    const FullAttentionSizes sizes;
    Fields fields = full_attention_fields(sizes);
    const PluginHandle plugin(
        library.creator("FullAttention")
            ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
    REQUIRE(plugin);
    for (const DataType type : {DataType::kHALF, DataType::kBF16}) {
        OperatorRun run(full_attention_spec(sizes, type));
        for (std::int64_t b = 0; b < sizes.sequences; ++b) {
            for (std::int64_t token = 0; token < sizes.tokens; ++token) {
                run.inputs[kV].fill({b, token}, static_cast<double>(token));
                for (std::int64_t head = 0; head < sizes.heads; ++head) {
                    run.inputs[kQ].set({b, token, head * sizes.head_dim}, kLoud);
                }
            }
        }
        run.inputs[kK].set({0, kPointed, sizes.head_dim}, kLoud);
        CHECK_EQUAL(run.run(plugin, memory, Aliasing::kApart), 0);
        CHECK_EQUAL(library.log().take(), "");
        for (std::int64_t b = 0; b < sizes.sequences; ++b) {
            for (std::int64_t token = 0; token < sizes.tokens; ++token) {
                for (std::int64_t column = 0; column < sizes.heads * sizes.head_dim; ++column) {
                    const bool points = b == 0 && column >= sizes.head_dim;
                    const double wanted = points ? kPointed : static_cast<double>(sizes.tokens - 1) / 2;
                    CHECK(std::abs(run.outputs[0].get({b, token, column}) - wanted) <= kTolerance);
                }
            }
        }
    }
}

}  // namespace starkv::tests
