# SPDX-License-Identifier: Apache-2.0
"""Which NVIDIA GPUs this machine has: asked of the driver, so nothing else needs to be installed."""

import ctypes
from ctypes import byref, c_int, c_size_t
from dataclasses import dataclass
from functools import cache
from typing import Any

from starkv.errors import EngineError

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``_MINOR``."""


@dataclass(frozen=True)
class Gpu:
    """A card that the driver can use."""

    name: str
    capability: tuple[int, int]
    """Compute capability; 8.0 and more have bfloat16."""
    memory: int
    """Bytes."""
    driver_cuda: tuple[int, int] = (0, 0)
    """Newest CUDA version that the driver runs."""


@cache
def cuda_driver() -> Any | None:
    """The initialised driver, or None where there is none or it sees no GPU."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    count = c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(byref(count)) or not count.value:
        return None
    return driver


def find_gpu(index: int = 0) -> Gpu | None:
    """The card with that index, or None."""
    driver = cuda_driver()
    device = c_int()
    if driver is None or driver.cuDeviceGet(byref(device), index):
        return None
    name, memory = ctypes.create_string_buffer(100), c_size_t()
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(byref(memory), device)
    major, minor, version = c_int(), c_int(), c_int()
    driver.cuDeviceGetAttribute(byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(byref(minor), _MINOR, device)
    driver.cuDriverGetVersion(byref(version))
    cuda = version.value // 1000, version.value % 1000 // 10
    return Gpu(name.value.decode(), (major.value, minor.value), memory.value, cuda)


def require_gpu() -> Gpu:
    """The first card.

    Raises:
        EngineError: there is none.
    """
    gpu = find_gpu()
    if gpu is None:
        raise EngineError("no NVIDIA GPU here: the driver is missing or sees none; check nvidia-smi")
    return gpu
