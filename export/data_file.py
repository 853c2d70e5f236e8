# SPDX-License-Identifier: Apache-2.0
"""A file of external tensors that grows while a graph is built, so that memory never holds the model."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from starkv.export.journal import Journal

_PAGE = 4096

Room = npt.NDArray[Any]
"""A writable array that is a part of the file."""


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


class DataFile:
    """External tensors one behind the other.

    Tensors begin at 64-byte boundaries, large ones at pages, so that a runtime can map them. The same
    tensors in the same order lie at the same places, which is how a later run finds those that an earlier
    one has finished.
    """

    def __init__(self, path: Path, journal: Journal) -> None:
        """Open the file of an earlier run, or a new one."""
        self._path, self._journal = path, journal
        self._end = 0
        path.touch()

    def store(
        self, specs: Sequence[TensorSpec], fill: Callable[[Sequence[Room]], None]
    ) -> list[ir.ExternalTensor]:
        """Append tensors that belong together, unless an earlier run has finished them.

        Args:
            specs: what to store.
            fill: writes into arrays of the stored shapes, which are zeroed; 4-bit types come packed, as uint8
                [..., N/2].

        Returns:
            References for the graph.

        Raises:
            OSError: the disk is full. Where the system can, space is allocated first: running out of it while
                writing to the mapping would be a fatal signal.
        """
        placed = [(spec, self._reserve(spec)) for spec in specs]
        rooms = [self._map(spec, offset) for spec, offset in placed]
        entries = [
            (self._path.name, spec.name, (offset, spec.length), room)
            for (spec, offset), room in zip(placed, rooms, strict=True)
        ]
        if not all(self._journal.holds(*entry) for entry in entries):
            fill(rooms)
            self._journal.add(entries)
        return [self._reference(spec, offset) for spec, offset in placed]

    def write(self, name: str, array: npt.NDArray[Any]) -> ir.ExternalTensor:
        """Append a whole array (any dtype of at least 8 bits)."""
        spec = TensorSpec(name, ir.DataType.from_numpy(array.dtype), array.shape)

        def fill(rooms: Sequence[Room]) -> None:
            rooms[0][...] = array

        return self.store([spec], fill)[0]

    def _reserve(self, spec: TensorSpec) -> int:
        alignment = _PAGE if spec.length >= _PAGE else 64
        offset = -(-self._end // alignment) * alignment
        self._end = offset + spec.length
        with self._path.open("r+b") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), offset, spec.length)
            elif os.fstat(stream.fileno()).st_size < self._end:
                stream.truncate(self._end)
        return offset

    def _map(self, spec: TensorSpec, offset: int) -> Room:
        return np.memmap(self._path, spec.stored_dtype, mode="r+", offset=offset, shape=spec.stored_shape)

    def _reference(self, spec: TensorSpec, offset: int) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self._path.name,
            offset,
            spec.length,
            spec.dtype,
            shape=ir.Shape(spec.shape),
            name=spec.name,
            base_dir=self._path.parent,
        )


def move_weights(model: ir.Model, data: DataFile) -> None:
    """Move a model's initializers of at least 1 KiB to a data file, in the order of the graph."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= 1024:
            value.const_value = data.write(str(value.name), tensor.numpy())
