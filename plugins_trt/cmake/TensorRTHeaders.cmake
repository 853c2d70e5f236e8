# SPDX-License-Identifier: Apache-2.0
# TensorRT's headers: sets TENSORRT_HEADERS to their directory, or leaves it empty. The library itself is
# never needed: TensorRT loads the plugins, not the other way round.

set(STARKV_TENSORRT_DOWNLOAD_TAG v11.1)
set(STARKV_TENSORRT_HEADERS_URL
  https://raw.githubusercontent.com/NVIDIA/TensorRT/${STARKV_TENSORRT_DOWNLOAD_TAG}/include
  CACHE STRING "Where STARKV_FETCH_TENSORRT_HEADERS downloads from")
# All that the plugins include, directly or not, and their SHA-256.
set(STARKV_TENSORRT_DOWNLOADS
  NvInferRuntime.h e78c2d49516a66f726864904386534f63eacf0ad75a6dfdde7dfa70adf39f797
  NvInferRuntimeBase.h ec38759dbf8a5538c4cd30890f1764658bc2dcec87e95ac18148e476cbe1671b
  NvInferRuntimeCommon.h eff4c0251cb4813bbc7fe34c6b28fdb6c08734c27ae53b07974d2557bf1431be
  NvInferRuntimePlugin.h d4db4236da9c03e543949247a75478b5ce68fc84eb30cd15b35081b94c8d8391
  NvInferPluginBase.h 759f354754e64bf4d1e68d7df796c155c46f8a27541bf1912ba13e79a5a26fc2
  NvInferImpl.h c6acddec7e286c18e9cd08511553c2015f99c487ca25717790e54e30c18ade79
  NvInferLegacyDims.h 3e10fe5b85545f2e956e6935271badf0b1c72553b698000a61d46d69c5d53030
  NvInferVersion.h 8648df4851fb2df1a15d7dfdae6454428c4b119055f65f6a98de8ff806977b2e)

function(starkv_download_tensorrt_headers directory)
  set(left ${STARKV_TENSORRT_DOWNLOADS})
  while(left)
    list(POP_FRONT left header hash)
    set(url ${STARKV_TENSORRT_HEADERS_URL}/${header})
    file(DOWNLOAD ${url} ${directory}/${header} EXPECTED_HASH SHA256=${hash} STATUS status)
    list(GET status 0 failed)
    if(failed)
      list(GET status 1 reason)
      message(FATAL_ERROR "${url}: ${reason}. Give the headers with TENSORRT_INCLUDE_DIR instead")
    endif()
  endwhile()
endfunction()

function(starkv_find_tensorrt_headers)
  if(TENSORRT_INCLUDE_DIR)
    set(asked_for ${TENSORRT_INCLUDE_DIR})
  elseif(TENSORRT_ROOT)
    set(asked_for ${TENSORRT_ROOT}/include ${TENSORRT_ROOT}/include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu)
  endif()
  if(asked_for)
    find_path(TENSORRT_HEADERS NvInferRuntime.h PATHS ${asked_for} NO_DEFAULT_PATH)
    if(NOT TENSORRT_HEADERS)
      # Somebody asked for these: another version in their place would surprise.
      message(FATAL_ERROR "no NvInferRuntime.h in ${asked_for}; give its directory with TENSORRT_INCLUDE_DIR")
    endif()
  else()
    find_path(TENSORRT_HEADERS NvInferRuntime.h
      PATHS /usr/include/x86_64-linux-gnu /usr/include/aarch64-linux-gnu /usr/include
            /usr/local/tensorrt/include
      NO_DEFAULT_PATH)
  endif()
  if(NOT TENSORRT_HEADERS AND STARKV_FETCH_TENSORRT_HEADERS)
    set(directory ${CMAKE_BINARY_DIR}/tensorrt-headers-${STARKV_TENSORRT_DOWNLOAD_TAG})
    starkv_download_tensorrt_headers(${directory})
    set(TENSORRT_HEADERS ${directory} CACHE PATH "" FORCE)
  endif()
  if(TENSORRT_HEADERS)
    message(STATUS "starkv: TensorRT's headers in ${TENSORRT_HEADERS}")
  endif()
endfunction()

# Found anew each time, so that a changed TENSORRT_ROOT takes effect in an old build directory.
unset(TENSORRT_HEADERS CACHE)
starkv_find_tensorrt_headers()
