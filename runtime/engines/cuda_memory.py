# SPDX-License-Identifier: Apache-2.0
"""Tensors in memory that CUDA allocates, with copies that wait: one stream in the role of a device."""

import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError
from starkv.runtime.engines.cuda import Cuda
from starkv.runtime.engines.device_tensor import Device, DeviceTensor


@dataclass(frozen=True)
class StreamDevice:
    """A stream's card as a :class:`Device`: every copy is done when the call returns."""

    cuda: Cuda
    stream: int

    @property
    def name(self) -> str:
        return self.cuda.name

    def synchronize(self) -> None:
        self.cuda.synchronize(self.stream)

    def clear(self, target: int, size: int) -> None:
        self.cuda.clear(target, size, self.stream)

    def upload(self, target: int, source: NDArray[Any]) -> None:
        self.cuda.upload(target, np.ascontiguousarray(source), self.stream)
        self.synchronize()

    def download(self, target: NDArray[Any], source: int) -> None:
        self.cuda.download(target, source, self.stream)
        self.synchronize()

    def copy(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        self.cuda.copy(target, target_pitch, source, source_pitch, width, height, self.stream)


class Block:
    """Memory on the card that goes back when nobody holds it any more."""

    def __init__(self, cuda: Cuda, stream: int, size: int) -> None:
        self.address, self.size = cuda.allocate(size), size
        self.free = weakref.finalize(self, _give_back, cuda, stream, self.address)


def _give_back(cuda: Cuda, stream: int, address: int) -> None:
    # A card that failed keeps its memory until the process ends, and has said so already.
    with suppress(EngineError):
        # Work that is queued may still use it.
        cuda.synchronize(stream)
        cuda.free(address)


def _no_room() -> bool:
    return False


@dataclass(frozen=True)
class CudaMemory:
    """Allocates tensors on a stream's card."""

    cuda: Cuda
    stream: int
    make_room: Callable[[], bool] = _no_room
    """Gives up memory that is only kept for later; False where there is none."""

    @property
    def device(self) -> Device:
        return StreamDevice(self.cuda, self.stream)

    def block(self, size: int) -> Block:
        """Bytes without a shape.

        Raises:
            EngineError: the card has no room.
        """
        try:
            return Block(self.cuda, self.stream, size)
        except EngineError:
            if not self.make_room():
                raise
        return Block(self.cuda, self.stream, size)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceTensor:
        dtype = np.dtype(dtype)
        block = self.block(int(np.prod(shape)) * dtype.itemsize)
        return DeviceTensor(block, self.device, block.address, tuple(shape), dtype)
