// SPDX-License-Identifier: Apache-2.0
// Names of status codes, and what kind of library this is.

#include "starkv_kernels.h"

namespace {

struct Status {
    const char* name;
    const char* message;
};

Status describe(int status) {
    switch (status) {
        case STARKV_OK:
            return {"STARKV_OK", "all is well"};
        case STARKV_ERROR_NULL_POINTER:
            return {"STARKV_ERROR_NULL_POINTER", "a required pointer is null"};
        case STARKV_ERROR_MISALIGNED:
            return {"STARKV_ERROR_MISALIGNED", "a tensor does not start at a multiple of 16 bytes"};
        case STARKV_ERROR_DTYPE:
            return {"STARKV_ERROR_DTYPE",
                    "unknown element type; caches are float32, float16 or bfloat16, attention takes the last "
                    "two"};
        case STARKV_ERROR_HEAD_DIM:
            return {
                "STARKV_ERROR_HEAD_DIM",
                "the head dimension must be 64, 80, 96, 128 or 256; FullAttention's 32, 64, 80, 96 or 128"};
        case STARKV_ERROR_WINDOW:
            return {"STARKV_ERROR_WINDOW", "the window must hold 1 to 64 queries"};
        case STARKV_ERROR_HEADS:
            return {"STARKV_ERROR_HEADS", "query heads must be a multiple of 1 to 64 KV heads"};
        case STARKV_ERROR_POOLING:
            return {"STARKV_ERROR_POOLING",
                    "pooling must be avgpool or maxpool with an odd kernel of 1 to 63"};
        case STARKV_ERROR_SHAPE:
            return {"STARKV_ERROR_SHAPE",
                    "a dimension is out of range, or the source as its own destination has other dimensions"};
        case STARKV_ERROR_WORKSPACE:
            return {"STARKV_ERROR_WORKSPACE", "the workspace is smaller than its function asks for"};
        case STARKV_ERROR_OVERLAP:
            return {
                "STARKV_ERROR_OVERLAP",
                "destination and source overlap; all three tensors must be the same memory, or all be apart"};
        case STARKV_ERROR_LAUNCH:
            return {"STARKV_ERROR_LAUNCH",
                    "CUDA refused the launch: no device, or this library holds no code for it"};
        case STARKV_ERROR_ARGUMENT:
            return {"STARKV_ERROR_ARGUMENT", "a scalar argument is out of range"};
        default:
            return {"STARKV_ERROR_UNKNOWN", "not a status of this library"};
    }
}

}  // namespace

const char* starkv_status_name(int status) { return describe(status).name; }
const char* starkv_status_message(int status) { return describe(status).message; }
int starkv_abi_version(void) { return STARKV_ABI_VERSION; }
const char* starkv_device_kind(void) {
#if STARKV_CPU
    return "cpu";
#else
    return "cuda";
#endif
}
