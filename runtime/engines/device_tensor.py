# SPDX-License-Identifier: Apache-2.0
"""Tensors in a device's memory, and what moves their bytes, whoever allocated them.

``HostDevice`` is the processor in the same role, so that everything but the driver's calls is tested without
a GPU.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from starkv.manifest import ComputeDtype

_DTYPES: dict[ComputeDtype, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


class Device(Protocol):
    """Moves bytes to, from and within a device's memory; addresses are integers. Sizes are in bytes."""

    @property
    def name(self) -> str:
        """``cpu`` or ``cuda``."""

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def clear(self, target: int, size: int) -> None:
        """Set bytes to 0."""

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Copy an array's bytes to the device."""

    def download(self, target: NDArray[Any], source: int) -> None:
        """Fill a contiguous array from the device."""

    def copy(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Copy ``height`` runs of ``width`` bytes that begin every ``pitch`` bytes."""


class HostDevice:
    """The processor as a device."""

    name = "cpu"

    def synchronize(self) -> None:
        return None

    def clear(self, target: int, size: int) -> None:
        ctypes.memset(target, 0, size)

    def upload(self, target: int, source: NDArray[Any]) -> None:
        array = np.ascontiguousarray(source)
        ctypes.memmove(target, array.ctypes.data, array.nbytes)

    def download(self, target: NDArray[Any], source: int) -> None:
        ctypes.memmove(target.ctypes.data, source, target.nbytes)

    def copy(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)


def numpy_dtype(dtype: ComputeDtype) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(_DTYPES[dtype])
    return found


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor in a device's memory."""

    owner: Any
    """What keeps the memory."""
    device: Device
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def at(self, *index: int) -> int:
        """Address of the part with these leading indices."""
        offset = 0
        for position, size in zip(index, self.shape, strict=False):
            offset = offset * size + position
        return self.address + offset * math.prod(self.shape[len(index) :]) * self.dtype.itemsize

    def write(self, array: NDArray[Any]) -> None:
        """Copy an array of the tensor's shape to the device, converted to its dtype."""
        self.device.upload(self.address, np.broadcast_to(array, self.shape).astype(self.dtype, copy=False))

    def read(self) -> NDArray[Any]:
        """A copy on the host."""
        array = np.empty(self.shape, self.dtype)
        self.device.download(array, self.address)
        return array


class DeviceMemory(Protocol):
    """Allocates tensors on one device."""

    @property
    def device(self) -> Device: ...

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceTensor:
        """A tensor whose content is undefined.

        Args:
            shape: of the tensor; no dimension may be 0.
            dtype: numpy's, or ``ml_dtypes.bfloat16``.
        """
        ...


def on_device(memory: DeviceMemory, array: NDArray[Any]) -> DeviceTensor:
    """A copy of an array on the device."""
    tensor = memory.empty(array.shape, array.dtype)
    tensor.write(array)
    return tensor
