# SPDX-License-Identifier: Apache-2.0
"""Writes a graph's weights to its data file while the graph is built, so memory never holds the model."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from starkv.errors import CheckpointError, UsageError
from starkv.export.progress import Progress
from starkv.export.quantize.blockwise import choose_block_size, pack_int4, quantize_blockwise
from starkv.export.quantize.columns import Bits
from starkv.export.quantize.presets import Storage

_CHUNK_BYTES = 32 << 20
_PAGE = 4096


class WeightSource(Protocol):
    """Where weights come from; a :class:`~starkv.export.checkpoint.Checkpoint` is one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start … stop-1`` of a tensor."""


@dataclass(frozen=True)
class LinearWeight:
    """A stored weight [K,N]: float32, or integer codes with scales [K/block_size,N]."""

    values: ir.ExternalTensor
    scales: ir.ExternalTensor | None = None
    block_size: int | None = None


class DataFile:
    """A file of external tensors that grows as they are written.

    Tensors begin at 64-byte boundaries, large ones at pages, so that a runtime can map them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = 0
        path.touch(exist_ok=False)

    def reserve(
        self, name: str, dtype: ir.DataType, shape: Sequence[int]
    ) -> tuple[ir.ExternalTensor, npt.NDArray[Any]]:
        """Append room for a tensor and map it for writing.

        Returns:
            The tensor's reference and a writable array of its shape; 4-bit types come packed, as uint8
            [..., N/2]. Data is in the file once the array is released.

        Raises:
            OSError: the disk is full. Where the system can, space is allocated first: running out of it
                while writing to the mapping would be a fatal signal.
        """
        stored_shape = (*shape[:-1], shape[-1] // 2) if dtype.bitwidth == 4 else tuple(shape)
        stored_dtype = np.dtype(np.uint8) if dtype.bitwidth == 4 else dtype.numpy()
        length = math.prod(stored_shape) * stored_dtype.itemsize
        alignment = _PAGE if length >= _PAGE else 64
        offset = -(-self._end // alignment) * alignment
        with self._path.open("r+b") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), offset, length)
            else:
                stream.truncate(offset + length)
        self._end = offset + length
        reference = ir.ExternalTensor(
            self._path.name,
            offset,
            length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self._path.parent,
        )
        return reference, np.memmap(self._path, stored_dtype, mode="r+", offset=offset, shape=stored_shape)

    def write(self, name: str, array: npt.NDArray[Any]) -> ir.ExternalTensor:
        """Append a whole array (any dtype of at least 8 bits)."""
        reference, room = self.reserve(name, ir.DataType.from_numpy(array.dtype), array.shape)
        room[...] = array
        return reference


class WeightWriter:
    """Reads weights from a source, converts them to their storage and appends them to a data file."""

    def __init__(self, source: WeightSource, data: DataFile, progress: Progress, block_size: int) -> None:
        self._source = source
        self._data = data
        self._progress = progress
        self._block_size = block_size

    def vector(self, names: Sequence[str], name: str) -> ir.ExternalTensor:
        """Store one-dimensional tensors (norms, biases) one behind the other as float32."""
        parts = [self._source.rows(part, 0, self._source.shape(part)[0]) for part in names]
        for part in names:
            self._progress.advance(part)
        return self._data.write(name, np.concatenate(parts))

    def linear(self, names: Sequence[str], name: str, storage: Storage) -> LinearWeight:
        """Store weights [Ni,K] of linear layers side by side as one [K,ΣNi].

        Further axes of a source (a convolution's kernel) count as part of K.

        Raises:
            CheckpointError: the layers differ in their number of inputs.
            UsageError: no block size divides K, or N is odd and the storage 4-bit.
        """
        shapes = [self._source.shape(part) for part in names]
        inputs = {math.prod(shape[1:]) for shape in shapes}
        if len(inputs) != 1:
            raise CheckpointError(
                f"{name}: layers to be fused take {sorted(inputs)} inputs; config.json is wrong"
            )
        features, outputs = inputs.pop(), sum(shape[0] for shape in shapes)
        if storage == "fp32":
            values, room = self._data.reserve(f"{name}.weight", ir.DataType.FLOAT, (features, outputs))
            for column, chunk in self._column_chunks(names, features):
                room[:, column : column + chunk.shape[1]] = chunk
            return LinearWeight(values)
        return self._quantized(names, name, 4 if storage == "int4" else 8, features, outputs)

    def _quantized(
        self, names: Sequence[str], name: str, bits: Bits, features: int, outputs: int
    ) -> LinearWeight:
        block_size = choose_block_size(features, self._block_size, name)
        if bits == 4 and outputs % 2:
            raise UsageError(f"{name} has an odd number of outputs ({outputs}); export it with int8")
        dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
        values, code_room = self._data.reserve(f"{name}.codes", dtype, (features, outputs))
        scales, scale_room = self._data.reserve(
            f"{name}.scales", ir.DataType.FLOAT, (features // block_size, outputs)
        )
        for column, chunk in self._column_chunks(names, features):
            codes, chunk_scales = quantize_blockwise(chunk, bits, block_size)
            end = column + chunk.shape[1]
            scale_room[:, column:end] = chunk_scales
            if bits == 4:
                code_room[:, column // 2 : end // 2] = pack_int4(codes)
            else:
                code_room[:, column:end] = codes
        return LinearWeight(values, scales, block_size)

    def _column_chunks(
        self, names: Sequence[str], features: int
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first column, columns [K,n]) of the fused weight; n is even but at a layer's end."""
        step = max(2, _CHUNK_BYTES // (4 * features) // 2 * 2)
        first = 0
        for name in names:
            rows = self._source.shape(name)[0]
            for start in range(0, rows, step):
                chunk = self._source.rows(name, start, min(start + step, rows)).reshape(-1, features)
                yield first + start, np.ascontiguousarray(chunk.T)
            first += rows
            self._progress.advance(name)


def move_weights(model: ir.Model, data: DataFile) -> None:
    """Move a model's initializers of at least 1 KiB to a data file, in the order of the graph."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= 1024:
            value.const_value = data.write(str(value.name), tensor.numpy())
