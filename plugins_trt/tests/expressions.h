// SPDX-License-Identifier: Apache-2.0
// An IExprBuilder whose expressions are numbers: it evaluates what a plugin says of its output shapes,
// without libnvinfer.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace starkv::tests {

class Number final : public nvinfer1::IDimensionExpr {
public:
    explicit Number(std::int64_t value) : implementation_(value) { mImpl = &implementation_; }
    ~Number() noexcept override = default;

private:
    struct Implementation final : nvinfer1::apiv::VDimensionExpr {
        explicit Implementation(std::int64_t number) : value(number) {}
        bool isConstant() const override { return true; }
        std::int64_t getConstantValue() const override { return value; }
        bool isSizeTensor() const override { return false; }
        std::int64_t value;
    };
    Implementation implementation_;
};

class NumberBuilder final : public nvinfer1::IExprBuilder {
public:
    NumberBuilder() { mImpl = &implementation_; }
    ~NumberBuilder() noexcept override = default;

private:
    struct Implementation final : nvinfer1::apiv::VExprBuilder {
        const nvinfer1::IDimensionExpr* constant(std::int64_t value) override {
            numbers.push_back(std::make_unique<Number>(value));
            return numbers.back().get();
        }
        const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation operation,
                                                  const nvinfer1::IDimensionExpr& first,
                                                  const nvinfer1::IDimensionExpr& second) override {
            using nvinfer1::DimensionOperation;
            const std::int64_t a = first.getConstantValue();
            const std::int64_t b = second.getConstantValue();
            switch (operation) {
                case DimensionOperation::kSUM:
                    return constant(a + b);
                case DimensionOperation::kPROD:
                    return constant(a * b);
                case DimensionOperation::kMAX:
                    return constant(std::max(a, b));
                case DimensionOperation::kMIN:
                    return constant(std::min(a, b));
                case DimensionOperation::kSUB:
                    return constant(a - b);
                case DimensionOperation::kEQUAL:
                    return constant(a == b);
                case DimensionOperation::kLESS:
                    return constant(a < b);
                case DimensionOperation::kFLOOR_DIV:
                    return constant(a / b);
                case DimensionOperation::kCEIL_DIV:
                    return constant((a + b - 1) / b);
            }
            return nullptr;
        }
        const nvinfer1::IDimensionExpr* declareSizeTensor(std::int32_t, const nvinfer1::IDimensionExpr&,
                                                          const nvinfer1::IDimensionExpr& most) override {
            return constant(most.getConstantValue());
        }
        std::vector<std::unique_ptr<Number>> numbers;
    };
    Implementation implementation_;
};

}  // namespace starkv::tests
