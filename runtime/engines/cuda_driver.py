# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's driver through ctypes: copies from, to and within a GPU's memory.

The driver comes with the card; nothing else needs to be installed.
"""

import ctypes
import time
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError
from starkv.gpu import cuda_driver

_ON_DEVICE = 2
"""``CU_MEMORYTYPE_DEVICE``."""


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
        driver = cuda_driver()
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
