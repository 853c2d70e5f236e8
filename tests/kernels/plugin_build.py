# SPDX-License-Identifier: Apache-2.0
"""Builds the plugins for the processor, against TensorRT headers of any number of versions."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from kernel_library import ROOT, tool
from workers import one_at_a_time

BUILD = ROOT / "build" / "plugins-cpu"
"""All versions are built here in turn, so that the kernels are compiled once."""
HEADERS_VARIABLE = "STARKV_TENSORRT_HEADERS"
"""Directories of NvInferRuntime.h, one per version to test, separated as in PATH."""
_SYSTEM = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
)
_LIBRARIES = ("libstarkv_trt_cpu.so", "libstarkv_plugin_driver.so", "libstarkv_kernels_cpu.so", "harness")


@dataclass(frozen=True)
class PluginBuild:
    """What was built against one version's headers."""

    folder: Path
    major: int
    """TensorRT's major version."""

    @property
    def plugin(self) -> Path:
        return self.folder / "libstarkv_trt_cpu.so"

    @property
    def driver(self) -> Path:
        return self.folder / "libstarkv_plugin_driver.so"

    def harness(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the harness on the plugin."""
        command = [self.folder / "harness", self.plugin, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def header_folders() -> list[Path]:
    """Folders of TensorRT's headers: those that the environment names, or what the system has."""
    if named := os.environ.get(HEADERS_VARIABLE):
        return [Path(folder) for folder in named.split(os.pathsep)]
    if root := os.environ.get("TENSORRT_ROOT"):
        return [Path(root) / "include"]
    return [folder for folder in map(Path, _SYSTEM) if (folder / "NvInferRuntime.h").is_file()]


@cache
def build(headers: Path, folder: Path) -> PluginBuild:
    """Build against one version's headers.

    Args:
        headers: folder of NvInferRuntime.h.
        folder: where the result goes.
    """
    cmake = tool("cmake")
    if not cmake or not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("the plugins need CMake and a C++ compiler")
    options = [f"-DTENSORRT_INCLUDE_DIR={headers}", "-DSTARKV_CUDA=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    with one_at_a_time(BUILD):
        report = _run([cmake, "-S", ROOT / "plugins_trt", "-B", BUILD, *options])
        if "no CUDA toolkit" in report:
            pytest.skip("no CUDA toolkit, whose cuda_runtime_api.h TensorRT's headers include")
        _run([cmake, "--build", BUILD, "--parallel", "2"])
        folder.mkdir(parents=True)
        for name in _LIBRARIES:
            shutil.copy2(BUILD / name, folder)
    version = _run([folder / "harness", folder / "libstarkv_trt_cpu.so"]).split("TensorRT ")[1]
    return PluginBuild(folder, int(version.split(".")[0]))


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
