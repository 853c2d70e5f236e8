# SPDX-License-Identifier: Apache-2.0
"""A data file of a graph: external tensors one behind the other, and how such tensors are read."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Bytes = npt.NDArray[np.uint8]
Room = npt.NDArray[Any]
"""A writable array that is a part of the file."""

_PAGE = 4096
_STRIPE_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a tensor that is to be stored."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file: two 4-bit values lie in one byte."""
        if self.dtype.bitwidth == 4:
            return (*self.shape[:-1], self.shape[-1] // 2)
        return self.shape

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8) if self.dtype.bitwidth == 4 else np.dtype(self.dtype.numpy())

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize


class TensorFile:
    """A file of external tensors.

    Tensors begin at 64-byte boundaries, large ones at pages, so that a runtime can map them. The same
    tensors in the same order lie at the same places.
    """

    def __init__(self, path: Path, new: bool = True) -> None:
        """Begin a file; unless it must be ``new``, one that is there keeps its bytes."""
        self.path, self._end = path, 0
        path.touch(exist_ok=not new)

    def reserve(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> tuple[ir.ExternalTensor, Room]:
        """Append room for a tensor and map it for writing; 4-bit types come packed, as uint8 [..., N/2].

        Raises:
            OSError: the disk is full. Where the system can, space is allocated first: running out of it
                while writing to the mapping would be a fatal signal.
        """
        spec = TensorSpec(name, dtype, tuple(shape))
        reference = self._allocate(spec)
        return reference, np.memmap(
            self.path, spec.stored_dtype, mode="r+", offset=reference.offset or 0, shape=spec.stored_shape
        )

    def copy(self, source: ir.ExternalTensor) -> ir.ExternalTensor:
        """Append a tensor as it is."""
        content = stored_bytes(source).reshape(-1)
        reference = self._allocate(TensorSpec(str(source.name), source.dtype, tuple(source.shape.numpy())))
        with self.path.open("r+b") as stream:
            stream.seek(reference.offset or 0)
            for start in range(0, content.size, _STRIPE_BYTES):
                stream.write(content[start : start + _STRIPE_BYTES].tobytes())
        return reference

    def convert(self, source: ir.ExternalTensor, name: str, dtype: ir.DataType) -> ir.ExternalTensor:
        """Append a float tensor rounded to ``dtype``, under another name."""
        values = stored_values(source).reshape(-1)
        reference, room = self.reserve(name, dtype, [int(size) for size in source.shape])
        flat, step = room.reshape(-1), _STRIPE_BYTES // 4
        for start in range(0, values.size, step):
            flat[start : start + step] = values[start : start + step].astype(flat.dtype)
        return reference

    def _allocate(self, spec: TensorSpec) -> ir.ExternalTensor:
        alignment = _PAGE if spec.length >= _PAGE else 64
        offset = -(-self._end // alignment) * alignment
        self._end = offset + spec.length
        with self.path.open("r+b") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), offset, spec.length)
            elif os.fstat(stream.fileno()).st_size < self._end:
                stream.truncate(self._end)
        return ir.ExternalTensor(
            self.path.name,
            offset,
            spec.length,
            spec.dtype,
            shape=ir.Shape(spec.shape),
            name=spec.name,
            base_dir=self.path.parent,
        )


def stored_bytes(source: ir.ExternalTensor) -> Bytes:
    """A read-only map of a tensor's bytes: [..., bytes of the last axis]."""
    *rows, last = source.shape.numpy()
    return np.memmap(
        Path(source.path),
        np.uint8,
        mode="r",
        offset=source.offset or 0,
        shape=(*rows, last * source.dtype.bitwidth // 8),
    )


def stored_values(source: ir.ExternalTensor) -> npt.NDArray[Any]:
    """A read-only map of a tensor of at least 8 bits per element."""
    return stored_bytes(source).view(source.dtype.numpy())
