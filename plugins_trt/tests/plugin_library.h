// SPDX-License-Identifier: Apache-2.0
// A plugin library loaded as TensorRT loads it, without TensorRT.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace starkv::tests {

// Collects what plugins report.
class MessageLog final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override;
    // All messages since the last call, a line each.
    std::string take();

private:
    std::string text_;
};

class MessageLogFinder final : public nvinfer1::ILoggerFinder {
public:
    explicit MessageLogFinder(MessageLog& log) : log_(log) {}
    nvinfer1::ILogger* findLogger() override { return &log_; }

private:
    MessageLog& log_;
};

// Stays loaded until the process ends, as in TensorRT's registry.
class PluginLibrary {
public:
    // Throws std::runtime_error with the reason.
    explicit PluginLibrary(const std::string& path);

    // Null if the library has no such operator.
    nvinfer1::IPluginCreatorV3One* creator(const std::string& operator_name) const;
    int creator_count() const { return creator_count_; }
    MessageLog& log() { return log_; }

private:
    MessageLog log_;
    MessageLogFinder finder_{log_};
    nvinfer1::IPluginCreatorInterface* const* creators_ = nullptr;
    std::int32_t creator_count_ = 0;
};

// A plugin and its three faces.
class PluginHandle {
public:
    explicit PluginHandle(nvinfer1::IPluginV3* plugin) : plugin_(plugin) {}
    explicit operator bool() const { return plugin_ != nullptr; }

    nvinfer1::IPluginV3* get() const { return plugin_.get(); }
    nvinfer1::IPluginV3OneCore* core() const;
    nvinfer1::IPluginV3OneBuildV2* build() const;
    nvinfer1::IPluginV3OneRuntime* runtime() const;

private:
    std::unique_ptr<nvinfer1::IPluginV3> plugin_;
};

}  // namespace starkv::tests
