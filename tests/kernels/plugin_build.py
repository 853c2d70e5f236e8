# SPDX-License-Identifier: Apache-2.0
"""Builds the plugins for the processor, against TensorRT headers of any number of versions."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "plugins_trt"
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
    """Folders with TensorRT's headers on this machine."""
    return [folder for folder in _candidates() if (folder / "NvInferRuntime.h").is_file()]


def _candidates() -> Iterator[Path]:
    named = os.environ.get(HEADERS_VARIABLE)
    if named:
        yield from map(Path, named.split(os.pathsep))
    elif root := os.environ.get("TENSORRT_ROOT"):
        yield Path(root) / "include"
    else:
        yield from map(Path, _SYSTEM)


def tool(name: str) -> str:
    """A program of the virtual environment or of the system; skips the test if there is none."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


@cache
def build(headers: Path, folder: Path) -> PluginBuild:
    """Build once per version.

    Args:
        headers: folder of NvInferRuntime.h.
        folder: for the build; all versions share it, so that the kernels are compiled once.
    """
    cmake, ninja = tool("cmake"), tool("ninja")
    configure = [
        *(cmake, "-S", SOURCE, "-B", folder / "shared", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *(f"-DTENSORRT_INCLUDE_DIR={headers}", "-DSTARKV_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Release"),
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    ]
    report = _run(configure)
    if "no CUDA toolkit" in report:
        pytest.skip("no CUDA toolkit, whose cuda_runtime_api.h TensorRT's headers include")
    _run([cmake, "--build", folder / "shared", "--parallel", "2"])
    built = Path(folder / headers.resolve().as_posix().replace("/", "_"))
    built.mkdir()
    for name in _LIBRARIES:
        shutil.copy2(folder / "shared" / name, built)
    version = _run([built / "harness", built / "libstarkv_trt_cpu.so"]).split("TensorRT ")[1]
    return PluginBuild(built, int(version.split(".")[0]))


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
