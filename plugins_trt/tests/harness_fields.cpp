// SPDX-License-Identifier: Apache-2.0
// Creators: what they say of themselves, which attributes they take and which they refuse.

#include "check.h"
#include "harness.h"

namespace starkv::tests {

using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

namespace {

using Values = std::map<std::string, std::string>;

// The plugin's attributes as it would serialise them; empty, with the messages in `log`, if it was refused.
Values created(PluginLibrary& library, const char* operator_name, Fields fields, std::string* log = nullptr) {
    library.log().take();
    const PluginHandle plugin(
        library.creator(operator_name)->createPlugin("layer", fields.collection(), TensorRTPhase::kBUILD));
    const std::string messages = library.log().take();
    if (log != nullptr) *log = messages;
    if (plugin) CHECK_EQUAL(messages, "");
    return plugin ? values_of(plugin.runtime()->getFieldsToSerialize()) : Values{};
}

void check_refused(PluginLibrary& library, const char* operator_name, Fields fields, const char* reason) {
    std::string log;
    CHECK(created(library, operator_name, fields, &log).empty());
    CHECK(log.find(std::string("starkv ") + operator_name + ": ") == 0);
    if (log.find(reason) == std::string::npos)
        fail(__FILE__, __LINE__, log + " does not say '" + reason + "'");
}

void check_creators(const PluginLibrary& library) {
    CHECK_EQUAL(library.creator_count(), 5);
    for (const char* name :
         {"KVCompress", "KVAttention", "FullAttention", "QuantizedKVAttention", "PackableKVAttention"}) {
        nvinfer1::IPluginCreatorV3One* creator = library.creator(name);
        REQUIRE(creator != nullptr);
        CHECK_EQUAL(std::string(creator->getPluginVersion()), "1");
        CHECK_EQUAL(std::string(creator->getPluginNamespace()), "ai.starkv");
        CHECK_EQUAL(std::string(creator->getInterfaceInfo().kind), "PLUGIN CREATOR_V3ONE");
    }
    const auto declares = [&](const char* name, int index, const char* field, PluginFieldType type,
                              int count = 2) {
        const nvinfer1::PluginFieldCollection* fields = library.creator(name)->getFieldNames();
        CHECK_EQUAL(fields->nbFields, count);
        CHECK_EQUAL(std::string(fields->fields[index].name), field);
        CHECK(fields->fields[index].type == type);
    };
    declares("KVCompress", 0, "pooling", PluginFieldType::kCHAR);
    declares("KVCompress", 1, "pooling_kernel", PluginFieldType::kINT32);
    declares("KVAttention", 0, "num_heads", PluginFieldType::kINT32);
    declares("KVAttention", 1, "kv_num_heads", PluginFieldType::kINT32);
    declares("FullAttention", 0, "num_heads", PluginFieldType::kINT32, 1);
    for (const char* name : {"QuantizedKVAttention", "PackableKVAttention"}) {
        declares(name, 2, "bits", PluginFieldType::kINT32, 4);
        declares(name, 3, "mrope_section", PluginFieldType::kINT32, 4);
    }
}

void check_compress_fields(PluginLibrary& library) {
    CHECK((created(library, "KVCompress", Fields()) ==
           Values{{"pooling", "avgpool"}, {"pooling_kernel", "5"}}));
    const Values maximum{{"pooling", "maxpool"}, {"pooling_kernel", "7"}};
    CHECK(created(library, "KVCompress", Fields().add("pooling", "maxpool").add("pooling_kernel", 7)) ==
          maximum);
    // Some callers count the terminating zero, and ONNX nodes carry the plugin's address.
    Fields terminated;
    terminated.add_raw("pooling", "maxpool", PluginFieldType::kCHAR, 8).add("pooling_kernel", 7);
    terminated.add("plugin_namespace", "ai.starkv").add("plugin_version", "1");
    CHECK(created(library, "KVCompress", terminated) == maximum);

    check_refused(library, "KVCompress", Fields().add("pooling", "median"), "not 'median'");
    check_refused(library, "KVCompress", Fields().add("pooling", 1), "pooling must be a string");
    check_refused(library, "KVCompress", Fields().add("pooling", ""), "pooling must be a string");
    check_refused(library, "KVCompress", Fields().add("pooling_kernel", 4), "odd and in 1 ... 63, not 4");
    check_refused(library, "KVCompress", Fields().add("pooling_kernel", -1), "odd and in 1 ... 63, not -1");
    check_refused(library, "KVCompress", Fields().add("pooling_kernel", 65), "odd and in 1 ... 63, not 65");
    check_refused(library, "KVCompress", Fields().add("pooling_kernel", "5"), "must be one INT32");
    check_refused(library, "KVCompress", Fields().add("kernel", 5), "unknown attribute 'kernel'");
    const float number = 5.0F;
    Fields wrong_type;
    wrong_type.add_raw("pooling_kernel", &number, PluginFieldType::kFLOAT32, 1);
    check_refused(library, "KVCompress", wrong_type, "must be one INT32 (field type 1, length 1 given)");
    const std::int32_t two[] = {5, 7};
    Fields wrong_length;
    wrong_length.add_raw("pooling_kernel", two, PluginFieldType::kINT32, 2);
    check_refused(library, "KVCompress", wrong_length, "must be one INT32 (field type 5, length 2 given)");
    Fields no_data;
    no_data.add_raw("pooling_kernel", nullptr, PluginFieldType::kINT32, 1);
    check_refused(library, "KVCompress", no_data, "must be one INT32");
}

void check_attention_fields(PluginLibrary& library) {
    const auto heads = [](std::int32_t query_heads, std::int32_t kv_heads) {
        return Fields().add("num_heads", query_heads).add("kv_num_heads", kv_heads);
    };
    CHECK((created(library, "KVAttention", heads(28, 4)) ==
           Values{{"num_heads", "28"}, {"kv_num_heads", "4"}}));
    check_refused(library, "KVAttention", heads(28, 5), "28 and 5 are not");
    check_refused(library, "KVAttention", heads(-4, 4), "-4 and 4 are not");
    check_refused(library, "KVAttention", Fields().add("num_heads", 4), "must be given");
    check_refused(library, "KVAttention", Fields().add("kv_num_heads", 4), "must be given");
    check_refused(library, "KVAttention", heads(4, 4).add("scale", 1), "unknown attribute 'scale'");
    nvinfer1::IPluginCreatorV3One* creator = library.creator("KVAttention");
    CHECK(creator->createPlugin("layer", nullptr, TensorRTPhase::kBUILD) == nullptr);
    nvinfer1::PluginFieldCollection malformed{};
    malformed.nbFields = 2;
    CHECK(creator->createPlugin("layer", &malformed, TensorRTPhase::kBUILD) == nullptr);
    CHECK(library.log().take().find("malformed collection of 2 fields") != std::string::npos);
}

void check_full_attention_fields(PluginLibrary& library) {
    CHECK((created(library, "FullAttention", Fields().add("num_heads", 16)) == Values{{"num_heads", "16"}}));
    check_refused(library, "FullAttention", Fields(), "must be given and at least 1; 0 is not");
    check_refused(library, "FullAttention", Fields().add("num_heads", -1), "-1 is not");
    check_refused(library, "FullAttention", Fields().add("heads", 4), "unknown attribute 'heads'");
}

// Of QuantizedKVAttention and PackableKVAttention.
void check_coded_attention_fields(PluginLibrary& library, const char* name) {
    const auto some = [](std::int32_t query_heads, std::int32_t kv_heads, std::int32_t bits) {
        return Fields().add("num_heads", query_heads).add("kv_num_heads", kv_heads).add("bits", bits);
    };
    CHECK((created(library, name, some(28, 4, 8).add_list("mrope_section", {16, 24, 24})) ==
           Values{{"num_heads", "28"}, {"kv_num_heads", "4"}, {"bits", "8"}, {"mrope_section", "16 24 24"}}));
    check_refused(library, name, some(28, 5, 8).add_list("mrope_section", {64, 0, 0}), "28 and 5 are not");
    check_refused(library, name, some(28, 4, 3).add_list("mrope_section", {64, 0, 0}), "4 or 8; 3 is not");
    check_refused(library, name, some(28, 4, 8), "mrope_section must be given");
    check_refused(library, name, some(28, 4, 8).add_list("mrope_section", {65, -1, 0}),
                  "65, -1 and 0 are not");
    check_refused(library, name, some(28, 4, 8).add_list("mrope_section", {32, 32}),
                  "mrope_section must be 3 INT32 (field type 5, length 2 given)");
    check_refused(library, name, some(28, 4, 8).add("scale", 1), "unknown attribute 'scale'");
}

// A plugin, what TensorRT makes of its serialised fields, its clone and its copy in an execution context.
void check_copies(PluginLibrary& library, const char* operator_name, Fields fields) {
    nvinfer1::IPluginCreatorV3One* creator = library.creator(operator_name);
    const PluginHandle plugin(creator->createPlugin("layer", fields.collection(), TensorRTPhase::kBUILD));
    REQUIRE(plugin);
    const PluginHandle recreated(
        creator->createPlugin("layer", plugin.runtime()->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    const PluginHandle cloned(plugin.get()->clone());
    const PluginHandle attached(plugin.runtime()->attachToContext(nullptr));
    const Values values = values_of(plugin.runtime()->getFieldsToSerialize());
    CHECK(!values.empty());
    for (const PluginHandle* copy : {&recreated, &cloned, &attached}) {
        REQUIRE(*copy);
        CHECK(copy->get() != plugin.get());
        CHECK(values_of(copy->runtime()->getFieldsToSerialize()) == values);
        CHECK_EQUAL(std::string(copy->core()->getPluginName()), operator_name);
        CHECK_EQUAL(std::string(copy->core()->getPluginVersion()), "1");
        CHECK_EQUAL(std::string(copy->core()->getPluginNamespace()), "ai.starkv");
        CHECK_EQUAL(std::string(copy->build()->getTimingCacheID()), plugin.build()->getTimingCacheID());
    }
    // A clone outlives what it was made of, which sanitizers watch.
    PluginHandle parent(plugin.get()->clone());
    const PluginHandle child(parent.get()->clone());
    parent = PluginHandle(nullptr);
    CHECK(values_of(child.runtime()->getFieldsToSerialize()) == values);
}

void check_timing_cache_ids(PluginLibrary& library) {
    const auto id = [&](const char* operator_name, Fields fields) {
        const PluginHandle plugin(library.creator(operator_name)
                                      ->createPlugin("layer", fields.collection(), TensorRTPhase::kBUILD));
        return plugin ? std::string(plugin.build()->getTimingCacheID()) : std::string();
    };
    const std::string average = id("KVCompress", Fields());
    CHECK(average != id("KVCompress", Fields().add("pooling", "maxpool")));
    CHECK(average != id("KVCompress", Fields().add("pooling_kernel", 7)));
    CHECK(id("FullAttention", full_attention_fields({})) !=
          id("FullAttention", Fields().add("num_heads", 9)));
    QuantizedSizes four_bits;
    four_bits.bits = 4;
    for (const char* name : {"QuantizedKVAttention", "PackableKVAttention"})
        CHECK(id(name, quantized_fields({})) != id(name, quantized_fields(four_bits)));
    CHECK(id("KVAttention", attention_fields({})) !=
          id("KVAttention", Fields().add("num_heads", 28).add("kv_num_heads", 4)));
}

}  // namespace

void check_fields(PluginLibrary& library) {
    check_creators(library);
    check_compress_fields(library);
    check_attention_fields(library);
    check_full_attention_fields(library);
    for (const char* name : {"QuantizedKVAttention", "PackableKVAttention"}) {
        check_coded_attention_fields(library, name);
        check_copies(library, name, quantized_fields({}));
    }
    check_copies(library, "KVCompress", Fields().add("pooling", "maxpool").add("pooling_kernel", 9));
    check_copies(library, "KVAttention", attention_fields({}));
    check_copies(library, "FullAttention", full_attention_fields({}));
    check_timing_cache_ids(library);
}

}  // namespace starkv::tests
