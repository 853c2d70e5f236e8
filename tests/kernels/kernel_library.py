# SPDX-License-Identifier: Apache-2.0
"""The kernel library that the tests run: the GPU's, or the same kernels built for the processor."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from workers import one_at_a_time

from starkv.kernels.cuda_library import KernelLibrary, find_library
from starkv.kernels.library_paths import KERNELS, LIBRARY_VARIABLE

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "kernels-cpu"


def tool(name: str) -> str | None:
    """A program of the environment or of the system."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def built_for_the_processor(target: str, file: str) -> Path:
    """Build a target for the processor from the sources as they are; seconds where nothing changed."""
    cmake = tool("cmake")
    if not cmake or not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("the kernels need CMake and a C++ compiler to be built for the processor")
    options = ["-DSTARKV_CUDA=OFF", "-DSTARKV_TESTS=ON"]
    with one_at_a_time(BUILD):
        for command in (
            [cmake, "-S", str(ROOT / "plugins_trt"), "-B", str(BUILD), *options],
            [cmake, "--build", str(BUILD), "--target", target, "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
                pytest.fail(f"{' '.join(command)}:\n{said}", pytrace=False)
    return BUILD / file


def library_for(device: torch.device) -> KernelLibrary:
    """The library for tensors on a device; one that ``STARKV_KERNELS`` names goes first."""
    if named := os.environ.get(LIBRARY_VARIABLE):
        library = KernelLibrary(named)
        if library.device == device.type:
            return library
    if device.type == "cpu":
        return KernelLibrary(built_for_the_processor("starkv_kernels_cpu", KERNELS["cpu"]))
    found = find_library("cuda")
    if found is None:
        pytest.skip("no libstarkv_kernels.so: `make plugin` builds it, or STARKV_KERNELS names one")
    return found
