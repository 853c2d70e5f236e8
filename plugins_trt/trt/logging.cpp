// SPDX-License-Identifier: Apache-2.0
// TensorRT's logger, where it can be called, and standard error otherwise.

#include "logging.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "starkv_kernels.h"

namespace starkv::trt {

namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

// Major version of the TensorRT library that defines an object's class; 0 if no such library does.
int defining_major_version(const void* object) {
    const void* virtual_table = *static_cast<const void* const*>(object);
    Dl_info where{};
    if (dladdr(virtual_table, &where) == 0 || where.dli_fname == nullptr) return 0;
    void* library = dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return 0;
    const auto version = reinterpret_cast<std::int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    constexpr int kMajor = 10000;
    const int major = version != nullptr ? version() / kMajor : 0;
    dlclose(library);
    return major;
}

nvinfer1::ILogger* find_logger() noexcept {
    nvinfer1::ILoggerFinder* finder = logger_finder.load();
    if (finder == nullptr) return nullptr;
    try {
        return finder->findLogger();
    } catch (...) {  // findLogger alone of TensorRT's interfaces here is not noexcept.
        return nullptr;
    }
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept {
    // One build of the plugin serves TensorRT 10 and 11, with this exception: ILogger and ILoggerFinder got
    // other virtual tables in 11, so those of another major version than the headers' cannot be called.
    const int major = finder != nullptr ? defining_major_version(finder) : 0;
    const bool callable = major == 0 || major == NV_TENSORRT_MAJOR;
    logger_finder.store(callable ? finder : nullptr);
}

void report_error(const char* operator_name, const char* format, ...) noexcept {
    // No std::string: reporting must work without memory, too.
    constexpr int kMostBytes = 1024;
    char message[kMostBytes];
    const int prefix = std::snprintf(message, kMostBytes, "starkv %s: ", operator_name);
    if (prefix < 0 || prefix >= kMostBytes) return;
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message + prefix, static_cast<std::size_t>(kMostBytes - prefix), format, arguments);
    va_end(arguments);
    if (nvinfer1::ILogger* logger = find_logger()) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, message);
    } else {
        std::fprintf(stderr, "%s\n", message);
    }
}

void report_status(const char* operator_name, int status) noexcept {
    report_error(operator_name, "%s: %s", starkv_status_name(status), starkv_status_message(status));
}

}  // namespace starkv::trt
