# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint's weights, converts them to their storage and appends them to a graph's data file."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from starkv.errors import CheckpointError, UsageError
from starkv.export.data_file import DataFile
from starkv.export.progress import Progress
from starkv.export.quantize.blockwise import choose_block_size, fitting_block_size, quantize_rows
from starkv.export.quantize.columns import Bits, PackedWeight, QuantizedColumns
from starkv.export.quantize.presets import Storage
from starkv.export.quantized_storage import put_columns, quantized_specs
from starkv.export.tensor_file import Room, TensorSpec
from starkv.export.weight_source import NO_PADDING, LinearWeight, Padding, WeightSource

# A chunk and what is computed from it stay in the processor's cache.
_CHUNK_BYTES = 2 << 20
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class _Part:
    """One layer of a fused weight: its columns start at ``first``."""

    name: str
    outputs: int
    first: int


class WeightWriter:
    """Writes the weights of one graph."""

    def __init__(
        self,
        source: WeightSource,
        data: DataFile,
        progress: Progress,
        block_size: int,
        keep_packed: bool = False,
        origin: object = "checkpoint",
    ) -> None:
        """Prepare to write.

        Args:
            source: where weights come from.
            data: where they go.
            progress: told about each tensor of the source.
            block_size: inputs that share a scale, where it divides their number.
            origin: names the source in errors.
            keep_packed: store the integers of a quantized checkpoint as they are, whatever is asked for.
        """
        self._source = source
        self._data = data
        self._progress = progress
        self._block_size = block_size
        self._keep_packed = keep_packed
        self._origin = origin

    def vector(self, names: Sequence[str], name: str, length: int | None = None) -> ir.ExternalTensor:
        """Store one-dimensional tensors (norms, biases) one behind the other as float32.

        Args:
            names: tensors of the source.
            name: of the result.
            length: fill each with zeros up to this.

        Raises:
            CheckpointError: a value is not a number.
        """
        parts = []
        for part in names:
            values = self._source.rows(part, 0, self._source.shape(part)[0])
            _check_finite(values, part, self._origin)
            parts.append(np.pad(values, (0, (length or len(values)) - len(values))))
            self._progress.advance(part)
        return self._data.write(name, np.concatenate(parts))

    def input_divisors(self, norm: str) -> ir.ExternalTensor | None:
        """Store what a norm's outputs were divided by for the sake of quantization, if they were."""
        divisors = self._source.input_divisors(norm)
        return None if divisors is None else self._data.write(f"{norm}.divisors", divisors)

    def fused_groups(self, names: Sequence[str]) -> list[list[str]]:
        """Divide layers of one input into runs that can share one weight.

        Layers of a quantized checkpoint differ in what they share: bits, block size, order of inputs.
        """
        return [list(group) for _, group in groupby(names, key=self._layout)]

    def _layout(self, name: str) -> tuple[object, ...]:
        packed = self._packed(name)
        if packed is None:
            return ()
        order = packed.input_order
        return (
            packed.bits,
            packed.block_size,
            packed.has_zero_points,
            None if order is None else order.tobytes(),
        )

    def _packed(self, name: str) -> PackedWeight | None:
        return self._source.packed(name) if self._keep_packed else None

    def padded(self, features: int, storage: Storage, names: Sequence[str]) -> int:
        """Smallest number of features from ``features`` that blocks of a quantized storage divide."""
        if storage == "fp32" or any(self._packed(name) for name in names):
            return features
        if fitting_block_size(features, self._block_size) is not None:
            return features
        return -(-features // self._block_size) * self._block_size

    def linear(
        self, names: Sequence[str], name: str, storage: Storage, padding: Padding = NO_PADDING
    ) -> LinearWeight:
        """Store weights [Ni,K] of linear layers side by side as one [K,ΣNi].

        Further axes of a source (a convolution's kernel) count as part of K. Layers must be of one group of
        :meth:`fused_groups`.

        Raises:
            CheckpointError: the layers differ in their number of inputs, or a value is not a number.
            UsageError: no block size divides K, or N is odd and the storage 4-bit.
        """
        shapes = [self._source.shape(part) for part in names]
        inputs = {math.prod(shape[1:]) for shape in shapes}
        if len(inputs) != 1:
            raise CheckpointError(
                f"{name}: layers to be fused take {sorted(inputs)} inputs; config.json is wrong"
            )
        features = inputs.pop()
        parts, first = [], 0
        for part, shape in zip(names, shapes, strict=True):
            parts.append(_Part(part, shape[0], first))
            first += padding.outputs or shape[0]
        rows = padding.inputs or features
        packed = self._packed(names[0])
        if packed is not None:
            return self._store_packed(parts, name, packed, features, first)
        if storage == "fp32":
            return self._store_float(parts, name, features, rows, first)
        return self._store_quantized(parts, name, 4 if storage == "int4" else 8, features, rows, first)

    def _store_float(
        self, parts: Sequence[_Part], name: str, features: int, rows: int, columns: int
    ) -> LinearWeight:
        def fill(rooms: Sequence[Room]) -> None:
            def store(part: _Part, start: int, stop: int) -> None:
                chunk = self._rows(part, start, stop, features)
                _check_finite(chunk, part.name, self._origin)
                rooms[0][:features, part.first + start : part.first + stop] = chunk.T

            self._run(parts, features, store)

        spec = TensorSpec(f"{name}.weight", ir.DataType.FLOAT, (rows, columns))
        return LinearWeight(self._store(parts, [spec], fill)[0])

    def _store_quantized(
        self, parts: Sequence[_Part], name: str, bits: Bits, features: int, rows: int, columns: int
    ) -> LinearWeight:
        block_size = choose_block_size(rows, self._block_size, name)

        def fill(rooms: Sequence[Room]) -> None:
            def store(part: _Part, start: int, stop: int) -> None:
                chunk = self._rows(part, start, stop, features)
                if rows > features:
                    chunk = np.pad(chunk, ((0, 0), (0, rows - features)))
                codes, scales = quantize_rows(chunk, bits, block_size)
                _check_finite(scales, part.name, self._origin)
                columns = QuantizedColumns(np.ascontiguousarray(codes.T), scales.T)
                put_columns(rooms, part.first + start, columns, bits)

            self._run(parts, features, store)

        stored = self._store(parts, quantized_specs(name, bits, rows, columns, block_size), fill)
        return LinearWeight(stored[0], stored[1], block_size=block_size)

    def _store_packed(
        self, parts: Sequence[_Part], name: str, packed: PackedWeight, features: int, columns: int
    ) -> LinearWeight:
        bits, block_size = packed.bits, packed.block_size
        specs = quantized_specs(name, bits, features, columns, block_size)
        if packed.has_zero_points:
            dtype = specs[0].dtype
            specs.append(TensorSpec(f"{name}.zero_points", dtype, (features // block_size, columns)))

        def fill(rooms: Sequence[Room]) -> None:
            weights = {part.name: self._source.packed(part.name) for part in parts}

            def store(part: _Part, start: int, stop: int) -> None:
                weight = weights[part.name]
                assert weight is not None  # fused_groups puts packed layers among themselves
                chunk = weight.columns(start, stop)
                _check_finite(chunk.scales, part.name, self._origin)
                put_columns(rooms, part.first + start, chunk, bits)

            self._run(parts, features, store)

        stored = self._store(parts, specs, fill)
        order = packed.input_order
        return LinearWeight(
            stored[0],
            stored[1],
            stored[2] if packed.has_zero_points else None,
            block_size,
            None if order is None else self._data.write(f"{name}.input_order", order.astype(np.int64)),
        )

    def _store(
        self, parts: Sequence[_Part], specs: Sequence[TensorSpec], fill: Callable[[Sequence[Room]], None]
    ) -> list[ir.ExternalTensor]:
        codes = specs[0]
        if codes.dtype.bitwidth == 4 and any(part.outputs % 2 for part in parts):
            odd = next(part for part in parts if part.outputs % 2)
            raise UsageError(f"{odd.name} has an odd number of outputs ({odd.outputs}); export it with int8")
        stored = self._data.store(specs, fill)
        for part in parts:
            self._progress.advance(part.name)
        return stored

    def _rows(self, part: _Part, start: int, stop: int, features: int) -> npt.NDArray[np.float32]:
        return self._source.rows(part.name, start, stop).reshape(-1, features)

    def _run(self, parts: Sequence[_Part], features: int, store: Callable[[_Part, int, int], None]) -> None:
        """Call ``store`` for all chunks, on several threads: numpy lets go of the interpreter."""
        # Even, so that no byte of 4-bit codes belongs to two chunks.
        step = max(2, _CHUNK_BYTES // (4 * features) // 2 * 2)
        with ThreadPoolExecutor(_THREADS) as workers:
            for _ in workers.map(lambda chunk: store(*chunk), _chunks(parts, step)):
                pass


def _chunks(parts: Sequence[_Part], step: int) -> Iterator[tuple[_Part, int, int]]:
    for part in parts:
        for start in range(0, part.outputs, step):
            yield part, start, min(start + step, part.outputs)


def _check_finite(values: npt.NDArray[Any], name: str, origin: object) -> None:
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{origin}: tensor {name} holds values that are not finite numbers; the checkpoint is damaged, "
            "download it again"
        )
