// SPDX-License-Identifier: Apache-2.0
// Errors, reported where a user of TensorRT looks for them: in TensorRT's log.
#pragma once

#include <NvInferRuntime.h>

namespace starkv::trt {

// Reports through this finder's logger from now on; through standard error where there is none.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Reports an error of an operator; the rest is as for printf.
__attribute__((format(printf, 2, 3))) void report_error(const char* operator_name, const char* format,
                                                        ...) noexcept;

// Reports a starkv_status other than STARKV_OK.
void report_status(const char* operator_name, int status) noexcept;

}  // namespace starkv::trt
