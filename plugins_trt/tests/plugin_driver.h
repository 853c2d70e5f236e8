/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One call of a plugin from another language: starkv/kernels/plugin_driver.py loads this through ctypes, so
 * that a plugin's enqueue is compared with PyTorch on its own, without an engine around it.
 */
#ifndef STARKV_PLUGIN_DRIVER_H
#define STARKV_PLUGIN_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct starkv_driver_tensor {
    int32_t type; /* nvinfer1::DataType */
    int32_t rank; /* at most 8 */
    int64_t dims[8];
    void* data;
} starkv_driver_tensor;

typedef struct starkv_driver_field {
    const char* name;
    const char* text; /* null for integers */
    int32_t count;    /* of integers */
    const int32_t* integers;
} starkv_driver_field;

typedef struct starkv_driver_call {
    const char* plugin_library;
    const char* operator_name;
    int32_t field_count;
    const starkv_driver_field* fields;
    int32_t input_count;
    const starkv_driver_tensor* inputs;
    int32_t output_count;
    const starkv_driver_tensor* outputs;
} starkv_driver_call;

/* All functions return 0, or else put the reason into `message`. */

/* Where tensors of a plugin library must lie, "cuda" or "cpu", into `device` of at least 8 bytes. */
__attribute__((visibility("default"))) int starkv_driver_device(const char* plugin_library, char* device,
                                                                char* message, size_t message_bytes);

/* Bytes of workspace that the plugin asks for. */
__attribute__((visibility("default"))) int starkv_driver_workspace(const starkv_driver_call* call,
                                                                   size_t* bytes, char* message,
                                                                   size_t message_bytes);

/* As TensorRT does it: createPlugin, attachToContext, onShapeChange, enqueue. */
__attribute__((visibility("default"))) int starkv_driver_enqueue(const starkv_driver_call* call,
                                                                 void* workspace, void* stream, char* message,
                                                                 size_t message_bytes);

#ifdef __cplusplus
}
#endif
#endif
