// SPDX-License-Identifier: Apache-2.0

#include "plugin_library.h"

#include <dlfcn.h>

namespace starkv::tests {

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::PluginCapabilityType;

void MessageLog::log(Severity, const char* message) noexcept { text_ += std::string(message) + "\n"; }

std::string MessageLog::take() {
    std::string taken;
    taken.swap(text_);
    return taken;
}

PluginLibrary::PluginLibrary(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(dlerror());
    const auto get_creators =
        reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(dlsym(library, "getCreators"));
    const auto set_logger_finder =
        reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    if (get_creators == nullptr || set_logger_finder == nullptr) {
        throw std::runtime_error(path + " exports no getCreators or no setLoggerFinder");
    }
    set_logger_finder(&finder_);
    creators_ = get_creators(creator_count_);
}

IPluginCreatorV3One* PluginLibrary::creator(const std::string& operator_name) const {
    for (std::int32_t index = 0; index < creator_count_; ++index) {
        auto* creator = static_cast<IPluginCreatorV3One*>(creators_[index]);
        if (operator_name == creator->getPluginName()) return creator;
    }
    return nullptr;
}

nvinfer1::IPluginV3OneCore* PluginHandle::core() const {
    return static_cast<nvinfer1::IPluginV3OneCore*>(
        plugin_->getCapabilityInterface(PluginCapabilityType::kCORE));
}

nvinfer1::IPluginV3OneBuildV2* PluginHandle::build() const {
    return static_cast<nvinfer1::IPluginV3OneBuildV2*>(
        plugin_->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

nvinfer1::IPluginV3OneRuntime* PluginHandle::runtime() const {
    return static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin_->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

}  // namespace starkv::tests
