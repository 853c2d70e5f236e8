# SPDX-License-Identifier: Apache-2.0
# The kernels' libraries, and for each an object library that plugins include as a whole:
#   starkv_kernels_cpu, starkv_kernels_cpu_objects   always
#   starkv_kernels, starkv_kernels_objects           with a CUDA compiler, or imported through STARKV_KERNELS

set(STARKV_KERNELS_DIR ${CMAKE_CURRENT_SOURCE_DIR}/kernels)
set(STARKV_KERNELS_INCLUDE_DIR ${CMAKE_CURRENT_SOURCE_DIR}/include)
set(STARKV_KERNELS_EXPORTS ${CMAKE_CURRENT_LIST_DIR}/kernels.map)

# A shared library with the C ABI and nothing else from an object library's objects.
function(starkv_add_kernels_library target objects)
  add_library(${target} SHARED $<TARGET_OBJECTS:${objects}>)
  target_include_directories(${target} PUBLIC ${STARKV_KERNELS_INCLUDE_DIR})
  starkv_link_exports(${target} ${STARKV_KERNELS_EXPORTS})
endfunction()

# In directories of their own, since there a .cu file is C++ and here CUDA.
add_subdirectory(${CMAKE_CURRENT_LIST_DIR}/kernels_cpu kernels_cpu)

if(STARKV_KERNELS)
  if(NOT EXISTS ${STARKV_KERNELS})
    message(FATAL_ERROR "STARKV_KERNELS is ${STARKV_KERNELS}, which does not exist")
  endif()
  add_library(starkv_kernels SHARED IMPORTED GLOBAL)
  set_target_properties(starkv_kernels PROPERTIES
    IMPORTED_LOCATION ${STARKV_KERNELS} INTERFACE_INCLUDE_DIRECTORIES ${STARKV_KERNELS_INCLUDE_DIR})
elseif(STARKV_SANITIZE)
  starkv_not_built(starkv_kernels "the sanitizers are for code on the CPU (STARKV_SANITIZE=ON)")
elseif(NOT STARKV_CUDA)
  starkv_not_built(starkv_kernels "switched off by STARKV_CUDA=OFF")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    include(CudaArchitectures)
    starkv_choose_cuda_architectures()
    enable_language(CUDA)
    add_subdirectory(${CMAKE_CURRENT_LIST_DIR}/kernels_cuda kernels_cuda)
  else()
    string(CONCAT reason
      "no CUDA compiler; install the CUDA toolkit and put nvcc on PATH or into CUDACXX, "
      "or give a built library with STARKV_KERNELS")
    starkv_not_built(starkv_kernels "${reason}")
  endif()
endif()
