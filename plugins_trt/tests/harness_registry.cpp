// SPDX-License-Identifier: Apache-2.0
// The registry of a real TensorRT library, which works without a GPU. IPluginRegistry changed between major
// versions, so the harness's headers must be of the library's.

#include <dlfcn.h>

#include "check.h"
#include "harness.h"

namespace starkv::tests {

void check_registry(const std::string& plugin_library, const std::string& tensorrt_library) {
    void* library = dlopen(tensorrt_library.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) throw std::runtime_error(dlerror());
    const auto get_registry =
        reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"));
    const auto get_version = reinterpret_cast<std::int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    REQUIRE(get_registry != nullptr);
    REQUIRE(get_version != nullptr);
    constexpr int kMajor = 10000;
    CHECK_EQUAL(get_version() / kMajor, NV_TENSORRT_MAJOR);
    if (get_version() / kMajor != NV_TENSORRT_MAJOR) return;

    nvinfer1::IPluginRegistry* registry = get_registry();
    REQUIRE(registry->loadLibrary(plugin_library.c_str()) != nullptr);
    const auto creator = [&](const char* name, const char* version, const char* space) {
        return static_cast<nvinfer1::IPluginCreatorV3One*>(registry->getCreator(name, version, space));
    };
    REQUIRE(creator("KVCompress", "1", "ai.starkv") != nullptr);
    REQUIRE(creator("KVAttention", "1", "ai.starkv") != nullptr);
    REQUIRE(creator("FullAttention", "1", "ai.starkv") != nullptr);
    REQUIRE(creator("QuantizedKVAttention", "1", "ai.starkv") != nullptr);
    REQUIRE(creator("PackableKVAttention", "1", "ai.starkv") != nullptr);
    // Namespace and version are part of the key.
    CHECK(creator("KVCompress", "1", "") == nullptr);
    CHECK(creator("KVCompress", "2", "ai.starkv") == nullptr);
    // Errors go to whatever logger the library has by now; that they can be reported is what is checked.
    Fields fields;
    fields.add("pooling_kernel", 4);
    CHECK(creator("KVCompress", "1", "ai.starkv")
              ->createPlugin("layer", fields.collection(), nvinfer1::TensorRTPhase::kBUILD) == nullptr);
    check_build({*creator("KVCompress", "1", "ai.starkv"), *creator("KVAttention", "1", "ai.starkv"),
                 *creator("FullAttention", "1", "ai.starkv"),
                 *creator("QuantizedKVAttention", "1", "ai.starkv"),
                 *creator("PackableKVAttention", "1", "ai.starkv")});
}

}  // namespace starkv::tests
