# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's driver through ctypes: which GPUs there are, and copies from, to and within their memory.

The driver comes with the card; nothing else needs to be installed.
"""

import ctypes
import time
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``_MINOR``."""
_ON_DEVICE = 2
"""``CU_MEMORYTYPE_DEVICE``."""


@dataclass(frozen=True)
class Gpu:
    """A card that the driver can use."""

    name: str
    capability: tuple[int, int]
    """Compute capability; 8.0 and more have bfloat16."""
    memory: int
    """Bytes."""


class _Copy2D(ctypes.Structure):
    """``CUDA_MEMCPY2D``."""

    _fields_ = [
        *((f"src_{name}", kind) for name, kind in (("x", c_size_t), ("y", c_size_t), ("type", c_uint))),
        *((f"src_{name}", c_void_p) for name in ("host", "device", "array")),
        ("src_pitch", c_size_t),
        *((f"dst_{name}", kind) for name, kind in (("x", c_size_t), ("y", c_size_t), ("type", c_uint))),
        *((f"dst_{name}", c_void_p) for name in ("host", "device", "array")),
        *((name, c_size_t) for name in ("dst_pitch", "width", "height")),
    ]


@cache
def _driver() -> Any | None:
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
    driver = _driver()
    device = c_int()
    if driver is None or driver.cuDeviceGet(byref(device), index):
        return None
    name, memory = ctypes.create_string_buffer(100), c_size_t()
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(byref(memory), device)
    major, minor = c_int(), c_int()
    driver.cuDeviceGetAttribute(byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(byref(minor), _MINOR, device)
    return Gpu(name.value.decode(), (major.value, minor.value), memory.value)


class CudaDevice:
    """Memory of a GPU. Every operation waits for all work before it, and is done when it returns.

    ONNX Runtime and the kernels' library work in the card's primary context, which this one shares.
    """

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        """Take the card's primary context.

        Raises:
            EngineError: there is no such card.
        """
        driver = _driver()
        if driver is None:
            raise EngineError("no NVIDIA GPU here: the driver is missing or sees none; check nvidia-smi")
        self._driver, device, self._context = driver, c_int(), c_void_p()
        self._check("cuDeviceGet", byref(device), index)
        self._check("cuDevicePrimaryCtxRetain", byref(self._context), device)

    def _check(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._driver, function)(*arguments):
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, byref(text))
            reason = text.value.decode() if text.value else f"error {code}"
            raise EngineError(f"{function}: {reason}")

    def _call(self, function: str, *arguments: Any) -> None:
        self._check("cuCtxSetCurrent", self._context)
        self._check("cuCtxSynchronize")
        self._check(function, *arguments)
        self._check("cuCtxSynchronize")

    def synchronize(self) -> None:
        self._check("cuCtxSetCurrent", self._context)
        self._check("cuCtxSynchronize")

    def memory_in_use(self) -> int:
        """Bytes of the card that any process holds."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return total.value - free.value

    def copy_bandwidth(self, size: int = 1 << 30, rounds: int = 10) -> float:
        """Bytes per second that the card reads and writes together in a large copy; the best of some."""
        blocks = [c_void_p(), c_void_p()]
        best = float("inf")
        try:
            for block in blocks:
                self._call("cuMemAlloc_v2", byref(block), c_size_t(size))
            target, source = (int(block.value or 0) for block in blocks)
            for _ in range(rounds):
                started = time.perf_counter()
                self.copy(target, size >> 10, source, size >> 10, size >> 10, 1 << 10)
                best = min(best, time.perf_counter() - started)
        finally:
            for block in blocks:
                if block.value:
                    self._call("cuMemFree_v2", block)
        return 2 * size / best

    def clear(self, target: int, size: int) -> None:
        self._call("cuMemsetD8_v2", c_void_p(target), 0, c_size_t(size))

    def upload(self, target: int, source: NDArray[Any]) -> None:
        array = np.ascontiguousarray(source)
        self._call("cuMemcpyHtoD_v2", c_void_p(target), c_void_p(array.ctypes.data), c_size_t(array.nbytes))

    def download(self, target: NDArray[Any], source: int) -> None:
        pointer, size = c_void_p(target.ctypes.data), c_size_t(target.nbytes)
        self._call("cuMemcpyDtoH_v2", pointer, c_void_p(source), size)

    def copy(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        self._call(
            "cuMemcpy2D_v2",
            byref(
                _Copy2D(
                    src_type=_ON_DEVICE,
                    src_device=source,
                    src_pitch=source_pitch,
                    dst_type=_ON_DEVICE,
                    dst_device=target,
                    dst_pitch=target_pitch,
                    width=width,
                    height=height,
                )
            ),
        )
