# SPDX-License-Identifier: Apache-2.0
"""One tensor of a mapped safetensors file, read piece by piece so that little of the file stays resident."""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from starkv.export.safetensors_header import DTYPES, INTEGER_DTYPES

_SPAN_BYTES = 8 << 20
_LARGEST_KEPT = 96 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies inside a mapped file."""

    path: Path
    name: str
    """As the file spells it."""
    mapping: mmap.mmap
    offset: int
    """Of the first byte, from the beginning of the file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it."""

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Copy the rows ``start … stop-1`` of the first axis, in the stored dtype."""
        width = math.prod(self.shape[1:])
        shape = (stop - start, *self.shape[1:])
        copied: npt.NDArray[Any] = self._view(start * width, (stop - start) * width).reshape(shape).copy()
        self._drop_pages(start * width, (stop - start) * width)
        return copied

    def array(self) -> npt.NDArray[Any]:
        """Copy the whole tensor."""
        return self.rows(0, self.shape[0])

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Walk down the columns ``start … stop-1`` of a matrix, a few megabytes of the file at a time.

        Every page holds a part of every column: a matrix that is not too large stays resident until its last
        column has been read.

        Yields:
            The first row of a block, and a copy [rows, stop-start] of the block.
        """
        height, width = self.shape
        size = width * self._numpy_dtype.itemsize
        drop = stop == width or height * size > _LARGEST_KEPT
        step = max(1, _SPAN_BYTES // size)
        for row in range(0, height, step):
            rows = min(step, height - row)
            view = self._view(row * width, rows * width).reshape(rows, width)
            copied = view[:, start:stop].copy()
            del view
            if drop:
                self._drop_pages(row * width, rows * width)
            yield row, copied

    def columns(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Copy the columns ``start … stop-1`` of a matrix [rows, columns]."""
        return np.concatenate([block for _, block in self.column_blocks(start, stop)])

    @property
    def _numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype] if self.dtype in DTYPES else INTEGER_DTYPES[self.dtype]

    def _view(self, first: int, count: int) -> npt.NDArray[Any]:
        dtype = self._numpy_dtype
        return np.frombuffer(self.mapping, dtype, count, self.offset + first * dtype.itemsize)

    def _drop_pages(self, first: int, count: int) -> None:
        """Let the kernel forget these elements, so that reading a model keeps little of it resident."""
        if not hasattr(mmap, "MADV_DONTNEED") or not count:
            return
        size = self._numpy_dtype.itemsize
        begin, end = self.offset + first * size, self.offset + (first + count) * size
        begin -= begin % mmap.PAGESIZE
        self.mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)
