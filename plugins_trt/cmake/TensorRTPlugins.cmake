# SPDX-License-Identifier: Apache-2.0
# The plugin libraries starkv_trt and, for tests, starkv_trt_cpu.

set(STARKV_TRT_DIR ${CMAKE_CURRENT_SOURCE_DIR}/trt)
set(STARKV_TRT_EXPORTS ${STARKV_TRT_DIR}/exports.map)
set(STARKV_TRT_SOURCES
  ${STARKV_TRT_DIR}/coded_attention.cpp
  ${STARKV_TRT_DIR}/compress_plugin.cpp
  ${STARKV_TRT_DIR}/creators.cpp
  ${STARKV_TRT_DIR}/float_attention.cpp
  ${STARKV_TRT_DIR}/full_attention_plugin.cpp
  ${STARKV_TRT_DIR}/kv_attention_plugin.cpp
  ${STARKV_TRT_DIR}/logging.cpp
  ${STARKV_TRT_DIR}/operator_plugin.cpp
  ${STARKV_TRT_DIR}/packable_attention_plugin.cpp
  ${STARKV_TRT_DIR}/plugin_fields.cpp
  ${STARKV_TRT_DIR}/quantized_attention_plugin.cpp
  ${STARKV_TRT_DIR}/signature.cpp)

# Headers of others: their warnings are not ours to mend.
function(starkv_use_tensorrt_headers target)
  target_include_directories(${target} SYSTEM PRIVATE ${TENSORRT_HEADERS} ${CUDAToolkit_INCLUDE_DIRS})
endfunction()

function(starkv_add_plugin_library target device_copy_source)
  add_library(${target} MODULE ${STARKV_TRT_SOURCES} ${STARKV_TRT_DIR}/${device_copy_source})
  target_include_directories(${target} PRIVATE ${STARKV_KERNELS_INCLUDE_DIR})
  starkv_use_tensorrt_headers(${target})
  target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
  starkv_link_exports(${target} ${STARKV_TRT_EXPORTS})
endfunction()

find_package(CUDAToolkit QUIET)
set(reason "")
if(NOT TENSORRT_HEADERS)
  string(CONCAT reason
    "no TensorRT headers; give them with TENSORRT_ROOT or TENSORRT_INCLUDE_DIR, "
    "install libnvinfer-headers-dev, or set STARKV_FETCH_TENSORRT_HEADERS=ON")
elseif(NOT CUDAToolkit_FOUND)
  string(CONCAT reason
    "no CUDA toolkit, whose cuda_runtime_api.h TensorRT's headers include; "
    "install it or give it with CUDAToolkit_ROOT")
endif()

if(reason)
  starkv_not_built(starkv_trt "${reason}")
  starkv_not_built(starkv_trt_cpu "${reason}")
else()
  starkv_add_plugin_library(starkv_trt_cpu device_copy_cpu.cpp)
  target_link_libraries(starkv_trt_cpu PRIVATE starkv_kernels_cpu_objects)
  if(TARGET starkv_kernels)
    starkv_add_plugin_library(starkv_trt device_copy_cuda.cpp)
    if(TARGET starkv_kernels_objects)
      # One file that needs no other: it can be copied beside an engine, or serialised into one.
      target_link_libraries(starkv_trt PRIVATE starkv_kernels_objects)
    else()
      target_link_libraries(starkv_trt PRIVATE starkv_kernels)
    endif()
    target_link_libraries(starkv_trt PRIVATE CUDA::cudart_static)
  else()
    starkv_not_built(starkv_trt "it needs starkv_kernels")
  endif()
endif()
