# SPDX-License-Identifier: Apache-2.0
"""The data file of a lowered graph: external tensors one behind the other, and how such tensors are read."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Bytes = npt.NDArray[np.uint8]

_PAGE = 4096
_STRIPE_BYTES = 16 << 20


class TensorFile:
    """A new file of external tensors.

    Tensors begin at 64-byte boundaries, large ones at pages, so that a runtime can map them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._end = path, 0
        path.touch(exist_ok=False)

    def reserve(
        self, name: str, dtype: ir.DataType, shape: Sequence[int]
    ) -> tuple[ir.ExternalTensor, npt.NDArray[Any]]:
        """Append room for a tensor of at least 8 bits per element and map it for writing.

        Raises:
            OSError: the disk is full. Where the system can, space is allocated first: running out of it
                while writing to the mapping would be a fatal signal.
        """
        length = math.prod(shape) * dtype.bitwidth // 8
        offset = self._allocate(length)
        room = np.memmap(self.path, dtype.numpy(), mode="r+", offset=offset, shape=tuple(shape))
        return self._reference(name, dtype, shape, offset, length), room

    def copy(self, source: ir.ExternalTensor) -> ir.ExternalTensor:
        """Append a tensor as it is."""
        content = stored_bytes(source).reshape(-1)
        offset = self._allocate(content.size)
        with self.path.open("r+b") as stream:
            stream.seek(offset)
            for start in range(0, content.size, _STRIPE_BYTES):
                stream.write(content[start : start + _STRIPE_BYTES].tobytes())
        shape = [int(size) for size in source.shape]
        return self._reference(str(source.name), source.dtype, shape, offset, content.size)

    def convert(self, source: ir.ExternalTensor, name: str, dtype: ir.DataType) -> ir.ExternalTensor:
        """Append a float tensor rounded to ``dtype``, under another name."""
        values = stored_values(source).reshape(-1)
        reference, room = self.reserve(name, dtype, [int(size) for size in source.shape])
        flat, step = room.reshape(-1), _STRIPE_BYTES // 4
        for start in range(0, values.size, step):
            flat[start : start + step] = values[start : start + step].astype(flat.dtype)
        return reference

    def _allocate(self, length: int) -> int:
        alignment = _PAGE if length >= _PAGE else 64
        offset = -(-self._end // alignment) * alignment
        self._end = offset + length
        with self.path.open("r+b") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), offset, length)
            else:
                stream.truncate(self._end)
        return offset

    def _reference(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], offset: int, length: int
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self.path.name,
            offset,
            length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
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
