# SPDX-License-Identifier: Apache-2.0
"""Where the kernel libraries and TensorRT plugins lie. Needs no PyTorch."""

import os
from collections.abc import Iterator
from pathlib import Path

LIBRARY_VARIABLE = "STARKV_KERNELS"
BUILD_DIRECTORY = Path("build") / "plugin"
KERNELS = {"cuda": "libstarkv_kernels.so", "cpu": "libstarkv_kernels_cpu.so"}
PLUGINS = {"cuda": "libstarkv_trt.so", "cpu": "libstarkv_trt_cpu.so"}
PLUGIN_DRIVER = "libstarkv_plugin_driver.so"


def library_folders() -> Iterator[Path]:
    """Where a library may lie: beside the one that ``STARKV_KERNELS`` names, where ``make plugin`` builds it
    below the working directory, and the same beside this package."""
    if named := os.environ.get(LIBRARY_VARIABLE):
        yield Path(named).parent
    yield BUILD_DIRECTORY
    yield Path(__file__).resolve().parent.parent.parent / BUILD_DIRECTORY


def kernel_libraries(device: str) -> Iterator[Path]:
    """Kernel libraries for ``cuda`` or ``cpu`` that exist; the one that ``STARKV_KERNELS`` names goes first,
    whatever it is for."""
    if named := os.environ.get(LIBRARY_VARIABLE):
        yield Path(named)
    yield from _existing(KERNELS[device])


def plugin_libraries(device: str) -> tuple[Path, Path] | None:
    """The TensorRT plugins for ``cuda`` or ``cpu`` and the library that drives them, from one build."""
    for folder in library_folders():
        both = folder / PLUGINS[device], folder / PLUGIN_DRIVER
        if all(path.is_file() for path in both):
            return both
    return None


def _existing(name: str) -> Iterator[Path]:
    for folder in library_folders():
        if (folder / name).is_file():
            yield folder / name
