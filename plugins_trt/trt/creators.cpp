// SPDX-License-Identifier: Apache-2.0
// The library's only two exports, which TensorRT looks up when it loads a plugin library.
//
// There is no REGISTER_TENSORRT_PLUGIN: it needs getPluginRegistry of libnvinfer, and the library would then
// load beside one TensorRT only.

#include <NvInferRuntime.h>

#include "compress_plugin.h"
#include "full_attention_plugin.h"
#include "kv_attention_plugin.h"
#include "logging.h"
#include "packable_attention_plugin.h"
#include "quantized_attention_plugin.h"

namespace starkv::trt {

namespace {

template <class Plugin>
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    nvinfer1::IPluginV3* createPlugin(const char* /*name*/, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase /*phase*/) noexcept override {
        // Where the kernels are a library of their own, it may be another release's.
        if (starkv_abi_version() != STARKV_ABI_VERSION) {
            report_error(getPluginName(),
                         "the plugin is made for version %d of libstarkv_kernels, which is %d",
                         STARKV_ABI_VERSION, starkv_abi_version());
            return nullptr;
        }
        return Plugin::create(fields);
    }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return Plugin::attributes(); }
    const char* getPluginName() const noexcept override { return Plugin::operator_signature().name; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
};

}  // namespace

}  // namespace starkv::trt

#define STARKV_EXPORT extern "C" __attribute__((visibility("default")))

STARKV_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    starkv::trt::set_logger_finder(finder);
}

STARKV_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& creator_count) {
    using namespace starkv::trt;
    static Creator<CompressPlugin> compress;
    static Creator<KVAttentionPlugin> kv_attention;
    static Creator<FullAttentionPlugin> full_attention;
    static Creator<QuantizedAttentionPlugin> quantized_attention;
    static Creator<PackableAttentionPlugin> packable_attention;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&compress, &kv_attention, &full_attention,
                                                                  &quantized_attention, &packable_attention};
    creator_count = 5;
    return creators;
}
