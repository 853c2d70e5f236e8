// SPDX-License-Identifier: Apache-2.0
// Checks a plugin library as far as that goes without TensorRT, and for the CPU build without a GPU.
//
//   harness PLUGIN_LIBRARY                       creators, build phase, errors
//   harness PLUGIN_LIBRARY --enqueue             and real calls on host memory: the CPU build
//   harness PLUGIN_LIBRARY --registry LIBRARY    through the registry of libnvinfer.so or libnvinfer_lean.so

#include "harness.h"

#include <cstdio>
#include <exception>
#include <string>

#include "check.h"
#include "enqueue_checks.h"

namespace {

int usage() {
    std::fputs("usage: harness PLUGIN_LIBRARY [--enqueue | --registry TENSORRT_LIBRARY]\n", stderr);
    return 2;
}

void check(const std::string& path, bool enqueue) {
    using namespace starkv::tests;
    PluginLibrary library(path);
    REQUIRE(library.creator("KVCompress") != nullptr);
    REQUIRE(library.creator("KVAttention") != nullptr);
    REQUIRE(library.creator("FullAttention") != nullptr);
    REQUIRE(library.creator("QuantizedKVAttention") != nullptr);
    REQUIRE(library.creator("PackableKVAttention") != nullptr);
    check_fields(library);
    check_build({*library.creator("KVCompress"), *library.creator("KVAttention"),
                 *library.creator("FullAttention"), *library.creator("QuantizedKVAttention"),
                 *library.creator("PackableKVAttention")});
    check_errors(library);
    if (!enqueue) return;
    HostMemory memory;
    check_attention_runs(library, memory);
    check_full_attention_runs(library, memory);
    check_quantized_attention_runs(library, memory);
    check_packable_attention_runs(library, memory);
    check_compress_runs(library, memory);
}

}  // namespace

int main(int argument_count, char** arguments) {
    const std::string mode = argument_count > 2 ? arguments[2] : "";
    const bool registry = mode == "--registry" && argument_count == 4;
    const bool enqueue = mode == "--enqueue" && argument_count == 3;
    if (argument_count != 2 && !registry && !enqueue) return usage();
    try {
        if (registry) {
            starkv::tests::check_registry(arguments[1], arguments[3]);
        } else {
            check(arguments[1], enqueue);
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "harness: %s\n", error.what());
        return 1;
    }
    const int failures = starkv::tests::failure_count();
    std::printf("harness: %d failed checks, headers of TensorRT %d.%d\n", failures, NV_TENSORRT_MAJOR,
                NV_TENSORRT_MINOR);
    return failures == 0 ? 0 : 1;
}
