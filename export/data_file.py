# SPDX-License-Identifier: Apache-2.0
"""A file of external tensors that grows while a graph is built, so that memory never holds the model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from starkv.export.journal import Journal
from starkv.export.tensor_file import Room, TensorFile, TensorSpec


class DataFile:
    """A tensor file in which a later run finds the tensors that an earlier one has finished."""

    def __init__(self, path: Path, journal: Journal) -> None:
        """Open the file of an earlier run, or a new one."""
        self._file, self._journal = TensorFile(path, new=False), journal

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
            OSError: the disk is full.
        """
        placed = [self._file.reserve(spec.name, spec.dtype, spec.shape) for spec in specs]
        rooms = [room for _, room in placed]
        entries = [
            (self._file.path.name, spec.name, (reference.offset or 0, spec.length), room)
            for spec, (reference, room) in zip(specs, placed, strict=True)
        ]
        if not all(self._journal.holds(*entry) for entry in entries):
            fill(rooms)
            self._journal.add(entries)
        return [reference for reference, _ in placed]

    def write(self, name: str, array: npt.NDArray[Any]) -> ir.ExternalTensor:
        """Append a whole array (any dtype of at least 8 bits)."""
        spec = TensorSpec(name, ir.DataType.from_numpy(array.dtype), array.shape)

        def fill(rooms: Sequence[Room]) -> None:
            rooms[0][...] = array

        return self.store([spec], fill)[0]


def move_weights(model: ir.Model, data: DataFile) -> None:
    """Move a model's initializers of at least 1 KiB to a data file, in the order of the graph."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= 1024:
            value.const_value = data.write(str(value.name), tensor.numpy())
