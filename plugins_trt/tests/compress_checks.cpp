// SPDX-License-Identifier: Apache-2.0

#include <algorithm>

#include "check.h"
#include "enqueue_checks.h"

namespace starkv::tests {

namespace {

using nvinfer1::DataType;

enum Input { kK, kV, kQWindow, kHiddenNorm, kKvLen, kRowMeta, kFrame, kParameters, kLimits, kMiEma };
enum LaterInput { kDstK = 12, kDstV, kDstMeta, kSlot };
enum Output { kNewK, kNewV, kNewMeta, kNewLen, kRows, kScores, kStages, kNewMiEma };

constexpr std::int64_t kRowsHeld = 40;
constexpr std::int64_t kSlots[] = {2, 0};
constexpr std::int64_t kUntouchedSlot = 1;
constexpr double kLoud = 16.0;
constexpr double kDestinationMarker = 7.0;

// The rows before the window that have keys, and therefore all attention.
std::vector<std::int64_t> loud_rows(std::int64_t layer, std::int64_t sequence) {
    const std::int64_t first = 3 + 5 * layer + 7 * sequence;
    return {first, first + 6, first + 12};
}

// Positions in `parameters` (starkv/methods/star_kv_plan.py) that divide something; all parts stay switched
// off.
constexpr std::int64_t kDivisors[] = {1, 4, 7, 19, 20};

// The value of row r is r everywhere.
OperatorRun compress_case(const CompressSizes& sizes, DataType type) {
    OperatorRun run(compress_spec(sizes, type));
    for (std::int64_t layer = 0; layer < sizes.layers; ++layer) {
        for (std::int64_t b = 0; b < sizes.sequences; ++b) {
            run.inputs[kKvLen].set({layer, b}, kRowsHeld);
            for (std::int64_t head = 0; head < sizes.kv_heads; ++head) {
                run.inputs[kMiEma].set({layer, b, head}, 0.25);
                for (const std::int64_t row : loud_rows(layer, b))
                    run.inputs[kK].set({layer, b, head, row, 0}, kLoud);
                for (std::int64_t row = 0; row < sizes.capacity; ++row) {
                    run.inputs[kV].fill({layer, b, head, row}, static_cast<double>(row));
                }
            }
            for (std::int64_t head = 0; head < sizes.query_heads; ++head) {
                for (std::int64_t query = 0; query < sizes.window; ++query) {
                    run.inputs[kQWindow].set({layer, b, head, query, 0}, kLoud);
                }
            }
            for (std::int64_t row = 0; row < sizes.capacity; ++row) {
                run.inputs[kRowMeta].set({layer, b, row, 0}, -1);
                run.inputs[kRowMeta].set({layer, b, row, 1}, -1);
                run.inputs[kRowMeta].set({layer, b, row, 3}, static_cast<double>(row));
            }
        }
    }
    run.inputs[kFrame].set({0}, -1);
    run.inputs[kFrame].set({3}, 1);
    run.inputs[kFrame].set({4}, 1);
    for (const std::int64_t position : kDivisors) run.inputs[kParameters].set({position}, 1);
    run.inputs[kLimits].fill({}, 3);
    for (const int destination : {kDstK, kDstV, kDstMeta}) {
        run.inputs[static_cast<std::size_t>(destination)].fill({}, kDestinationMarker);
    }
    for (std::int64_t b = 0; b < sizes.sequences; ++b)
        run.inputs[kSlot].set({b}, static_cast<double>(kSlots[b]));
    return run;
}

void check_sequence(const CompressSizes& sizes, const OperatorRun& run, std::int64_t layer, std::int64_t b) {
    std::vector<std::int64_t> kept = loud_rows(layer, b);
    for (std::int64_t row = kRowsHeld - sizes.window; row < kRowsHeld; ++row) kept.push_back(row);
    const auto kept_count = static_cast<std::int64_t>(kept.size());
    CHECK_EQUAL(run.outputs[kNewLen].get({layer, b}), static_cast<double>(kept_count));
    for (std::int64_t place = 0; place < sizes.slot_capacity; ++place) {
        const bool filled = place < kept_count;
        const double row = filled ? static_cast<double>(kept[static_cast<std::size_t>(place)]) : -1.0;
        CHECK_EQUAL(run.outputs[kRows].get({layer, b, 0, place}), row);
        if (!filled) continue;
        const std::int64_t slot = kSlots[b];
        CHECK_EQUAL(run.outputs[kNewMeta].get({layer, slot, place, 3}), row);
        CHECK_EQUAL(run.outputs[kNewMeta].get({layer, slot, place, 0}), -1.0);
        for (std::int64_t head = 0; head < sizes.kv_heads; ++head) {
            CHECK_EQUAL(run.outputs[kNewV].get({layer, slot, head, place, 0}), row);
            CHECK_EQUAL(run.outputs[kNewV].get({layer, slot, head, place, sizes.head_dim - 1}), row);
            CHECK_EQUAL(run.outputs[kNewK].get({layer, slot, head, place, 0}), place < 3 ? kLoud : 0.0);
        }
    }
    for (std::int64_t row = 0; row < sizes.capacity; ++row) {
        const bool loud = std::count(kept.begin(), kept.begin() + 3, row) == 1;
        const double score = run.outputs[kScores].get({layer, b, row});
        CHECK_EQUAL(score > 0.1, loud);
        CHECK_EQUAL(run.outputs[kStages].get({layer, b, 0, row}) > 0.1, loud);
    }
    // The prior is off, so its averages stay.
    for (std::int64_t head = 0; head < sizes.kv_heads; ++head) {
        CHECK_EQUAL(run.outputs[kNewMiEma].get({layer, b, head}), 0.25);
    }
}

void check_untouched_slot(const CompressSizes& sizes, const OperatorRun& run) {
    for (std::int64_t layer = 0; layer < sizes.layers; ++layer) {
        for (std::int64_t row = 0; row < sizes.slot_capacity; ++row) {
            CHECK_EQUAL(run.outputs[kNewMeta].get({layer, kUntouchedSlot, row, 2}), kDestinationMarker);
            for (std::int64_t head = 0; head < sizes.kv_heads; ++head) {
                CHECK_EQUAL(run.outputs[kNewK].get({layer, kUntouchedSlot, head, row, 0}),
                            kDestinationMarker);
                CHECK_EQUAL(run.outputs[kNewV].get({layer, kUntouchedSlot, head, row, sizes.head_dim - 1}),
                            kDestinationMarker);
            }
        }
    }
}

}  // namespace

void check_compress_runs(PluginLibrary& library, Memory& memory) {
    const CompressSizes sizes;
    Fields fields;
    fields.add("pooling_kernel", 1);
    const PluginHandle plugin(
        library.creator("KVCompress")
            ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
    REQUIRE(plugin);
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        for (const Aliasing aliasing : {Aliasing::kShared, Aliasing::kApart}) {
            OperatorRun run = compress_case(sizes, type);
            CHECK_EQUAL(run.run(plugin, memory, aliasing), 0);
            CHECK_EQUAL(library.log().take(), "");
            for (std::int64_t layer = 0; layer < sizes.layers; ++layer) {
                for (std::int64_t b = 0; b < sizes.sequences; ++b) check_sequence(sizes, run, layer, b);
            }
            check_untouched_slot(sizes, run);
            if (aliasing == Aliasing::kApart) {
                CHECK_EQUAL(run.inputs[kDstK].get({0, kSlots[0], 0, 0, 0}), kDestinationMarker);
            }
        }
    }
}

}  // namespace starkv::tests
