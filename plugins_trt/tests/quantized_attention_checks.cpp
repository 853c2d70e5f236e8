// SPDX-License-Identifier: Apache-2.0

#include <cmath>

#include "attention_cases.h"
#include "check.h"
#include "enqueue_checks.h"

namespace starkv::tests {

namespace {

using nvinfer1::DataType;

enum Input { kQ, kK, kV, kPastK, kPastV, kKvLen, kPositions, kKScale, kVScale, kKBias, kVBias, kCos, kSin };
enum Output { kOut, kPresentK, kPresentV };

// The third cache has no room for one more row.
constexpr std::int64_t kRowsHeld[] = {5, 0, 16};
constexpr std::int64_t kPointedRow = 2, kPointedHead = 1;
// Along one dimension, keys and queries of this size leave other rows no attention: exp(-16 * 16 / 8).
constexpr double kLoud = 16.0;
constexpr double kKeyScale = 2.0, kValueScale = 0.5, kValueBias = 3.0;
// A value's code is its row's number, so that 4 bits do; the new row has this.
constexpr double kNewCode = 7.0;

// Codes as they lie in bytes, whatever type carries them.
class CodeTensor {
public:
    CodeTensor(HostTensor& tensor, const QuantizedSizes& sizes) : tensor_(tensor), sizes_(sizes) {}
    void set(std::int64_t b, std::int64_t head, std::int64_t row, std::int64_t column, int code) {
        unsigned char& byte = at(b, head, row, column);
        if (sizes_.bits == 8) {
            byte = static_cast<unsigned char>(code);
        } else {
            const int shift = static_cast<int>(column % 2) * 4;
            byte = static_cast<unsigned char>((byte & ~(15 << shift)) | (code + 8) << shift);
        }
    }
    int get(std::int64_t b, std::int64_t head, std::int64_t row, std::int64_t column) {
        const int byte = at(b, head, row, column);
        if (sizes_.bits == 8) return static_cast<signed char>(byte);
        return (byte >> column % 2 * 4 & 15) - 8;
    }

private:
    unsigned char& at(std::int64_t b, std::int64_t head, std::int64_t row, std::int64_t column) {
        const std::int64_t of_all = (b * sizes_.kv_heads + head) * sizes_.capacity + row;
        return tensor_.data()[(of_all * sizes_.head_dim + column) * sizes_.bits / 8];
    }

    HostTensor& tensor_;
    const QuantizedSizes& sizes_;
};

int old_code(std::int64_t row) { return static_cast<int>(row % 6); }

double expected(const QuantizedSizes& sizes, std::int64_t b, std::int64_t head) {
    if (kRowsHeld[b] >= sizes.capacity) return 0.0;
    const bool points = b == 0 && head / (sizes.query_heads / sizes.kv_heads) == kPointedHead;
    double sum = kNewCode;
    for (std::int64_t row = 0; row < kRowsHeld[b]; ++row) sum += old_code(row);
    const double code = points ? old_code(kPointedRow) : sum / static_cast<double>(kRowsHeld[b] + 1);
    return code * kValueScale + kValueBias;
}

}  // namespace

// Keys are 0 but for their bias: a query sees the average of its rows. Only in the first sequence's second KV
// head the bias makes one row's position loud: its t is 1, where the cosine is 1 instead of 0.
OperatorRun quantized_case(const QuantizedSizes& sizes, DataType type) {
    OperatorRun run(quantized_spec(sizes, type));
    auto& inputs = run.inputs;
    CodeTensor keys(inputs[kPastK], sizes), values(inputs[kPastV], sizes);
    inputs[kKScale].fill({}, kKeyScale);
    inputs[kVScale].fill({}, kValueScale);
    inputs[kVBias].fill({}, kValueBias);
    inputs[kKBias].set({kPointedHead * sizes.head_dim}, kLoud);
    inputs[kCos].set({1, 0}, 1.0);
    inputs[kV].fill({}, kNewCode * kValueScale + kValueBias);
    for (std::int64_t b = 0; b < sizes.sequences; ++b) {
        inputs[kKvLen].set({b}, static_cast<double>(kRowsHeld[b]));
        inputs[kQ].fill({b}, 0.0);
        for (std::int64_t head = 0; head < sizes.query_heads; ++head)
            inputs[kQ].set({b, 0, head * sizes.head_dim}, kLoud);
        for (std::int64_t row = 0; row < sizes.capacity; ++row) {
            // Of the new row t is 2: the greatest, as it must be for rows to be tabulated.
            inputs[kPositions].set({b, row, 0}, row == kRowsHeld[b] ? 2.0 : 0.0);
            for (std::int64_t head = 0; head < sizes.kv_heads; ++head)
                for (std::int64_t column = 0; column < sizes.head_dim; ++column) {
                    keys.set(b, head, row, column, 0);
                    values.set(b, head, row, column, old_code(row));
                }
        }
    }
    inputs[kPositions].set({0, kPointedRow, 0}, 1.0);
    return run;
}

void check_quantized_result(const QuantizedSizes& sizes, OperatorRun& run) {
    constexpr double kTolerance = 0.03;
    CodeTensor keys(run.outputs[kPresentK], sizes), values(run.outputs[kPresentV], sizes);
    for (std::int64_t b = 0; b < sizes.sequences; ++b) {
        for (std::int64_t head = 0; head < sizes.query_heads; ++head)
            for (const std::int64_t column : {std::int64_t{0}, std::int64_t{1}, sizes.head_dim - 1}) {
                const double seen = run.outputs[kOut].get({b, 0, head * sizes.head_dim + column});
                CHECK(std::abs(seen - expected(sizes, b, head)) <= kTolerance);
            }
        for (std::int64_t head = 0; head < sizes.kv_heads; ++head)
            for (std::int64_t row = 0; row < sizes.capacity; ++row)
                for (const std::int64_t column : {std::int64_t{0}, sizes.head_dim - 1}) {
                    const bool is_new = row == kRowsHeld[b];
                    CHECK_EQUAL(values.get(b, head, row, column),
                                is_new ? static_cast<int>(kNewCode) : old_code(row));
                    CHECK_EQUAL(keys.get(b, head, row, column), 0);
                }
    }
}

void check_quantized_attention_runs(PluginLibrary& library, Memory& memory) {
    for (const std::int64_t bits : {8, 4}) {
        QuantizedSizes sizes;
        sizes.bits = bits;
        Fields fields = quantized_fields(sizes);
        const PluginHandle plugin(
            library.creator("QuantizedKVAttention")
                ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
        REQUIRE(plugin);
        for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
            for (const Aliasing aliasing : {Aliasing::kShared, Aliasing::kApart}) {
                sizes.codes = aliasing == Aliasing::kShared ? DataType::kINT32 : DataType::kINT8;
                OperatorRun run = quantized_case(sizes, type);
                CHECK_EQUAL(run.run(plugin, memory, aliasing), 0);
                CHECK_EQUAL(library.log().take(), "");
                check_quantized_result(sizes, run);
                if (aliasing == Aliasing::kApart) {
                    CodeTensor past(run.inputs[kPastV], sizes);
                    CHECK_EQUAL(past.get(0, 0, kRowsHeld[0], 0), old_code(kRowsHeld[0]));
                }
            }
        }
    }
}

}  // namespace starkv::tests
