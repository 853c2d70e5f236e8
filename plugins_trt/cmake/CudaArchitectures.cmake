# SPDX-License-Identifier: Apache-2.0
# Which GPUs to build for: sets CMAKE_CUDA_ARCHITECTURES from STARKV_CUDA_ARCHS.

# From A100 and Jetson Orin (87) to Thor (110) and Blackwell.
set(STARKV_SUPPORTED_CUDA_ARCHS 80 86 87 89 90 100 110 120)

# Machine code for each architecture that the compiler knows, and PTX of the newest for GPUs to come.
function(starkv_choose_cuda_architectures)
  set(wanted ${STARKV_CUDA_ARCHS})
  if(NOT wanted)
    set(wanted ${STARKV_SUPPORTED_CUDA_ARCHS})
  endif()
  execute_process(
    COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code
    OUTPUT_VARIABLE listed RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    message(FATAL_ERROR "'${CMAKE_CUDA_COMPILER} --list-gpu-code' failed; starkv needs nvcc 11.5 or newer")
  endif()
  string(REGEX MATCHALL "sm_[0-9]+" known "${listed}")
  list(TRANSFORM known REPLACE "sm_" "")

  set(chosen "")
  foreach(architecture IN LISTS wanted)
    if(architecture IN_LIST known)
      list(APPEND chosen ${architecture})
    elseif(STARKV_CUDA_ARCHS)
      list(JOIN known ", " known)
      message(FATAL_ERROR
        "STARKV_CUDA_ARCHS has ${architecture}, but ${CMAKE_CUDA_COMPILER} knows only ${known}")
    endif()
  endforeach()
  if(NOT chosen)
    message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} knows no architecture that starkv supports; use a newer CUDA")
  endif()
  list(SORT chosen COMPARE NATURAL)
  list(GET chosen -1 newest)
  list(TRANSFORM chosen APPEND "-real")
  list(APPEND chosen ${newest}-virtual)
  set(CMAKE_CUDA_ARCHITECTURES "${chosen}" CACHE INTERNAL "from STARKV_CUDA_ARCHS")
  message(STATUS "starkv: GPU architectures ${CMAKE_CUDA_ARCHITECTURES}")
endfunction()
