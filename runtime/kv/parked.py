# SPDX-License-Identifier: Apache-2.0
"""Rows of one sequence in host memory, while it waits for its next turn or in a file.

A parked sequence takes what its rows take, no slot and no capacity, and goes into any arena or slot of an
engine of the same model and dtype.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starkv.methods.rows import ROW_COLUMNS, ROW_FRAME


@dataclass(frozen=True)
class ParkedRows:
    """A sequence's rows, layer by layer; layers may hold different numbers."""

    keys: tuple[NDArray[np.generic], ...]
    """L times ``[Hkv, rows, D]`` in the cache's dtype."""
    values: tuple[NDArray[np.generic], ...]
    """L times ``[Hkv, rows, D]``."""
    row_meta: tuple[NDArray[np.int32], ...]
    """L times ``[rows, 4]``, see ``starkv.methods.rows``."""
    positions: tuple[NDArray[np.int32], ...]
    """L times ``[rows, 3]``: t, h and w, −1 where they are unknown."""

    @classmethod
    def none(cls) -> "ParkedRows":
        """Before the first row."""
        return cls((), (), (), ())

    @property
    def packed(self) -> bool:
        """Whether keys and values are codes of a packed cache, not numbers."""
        return any(keys.dtype.kind in "iu" for keys in self.keys)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """``[L]``: rows of each layer."""
        return np.array([len(meta) for meta in self.row_meta], np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and what is known of them."""
        arrays = (*self.keys, *self.values, *self.row_meta, *self.positions)
        return sum(array.nbytes for array in arrays)

    def stacked_meta(self) -> NDArray[np.int32]:
        """``[L, H, 4]`` for H rows of the longest layer, −1 behind the others' last."""
        longest = int(self.lengths.max(initial=0))
        meta = np.full((len(self.row_meta), longest, ROW_COLUMNS), -1, np.int32)
        for layer, rows in enumerate(self.row_meta):
            meta[layer, : len(rows)] = rows
        return meta

    def without_frames_before(self, frame: int) -> "ParkedRows":
        """The rows but those of screenshots before number ``frame``: how a window slides over them."""
        kept = [(meta[:, ROW_FRAME] < 0) | (meta[:, ROW_FRAME] >= frame) for meta in self.row_meta]
        return ParkedRows(
            tuple(keys[:, rows] for keys, rows in zip(self.keys, kept, strict=True)),
            tuple(values[:, rows] for values, rows in zip(self.values, kept, strict=True)),
            tuple(meta[rows] for meta, rows in zip(self.row_meta, kept, strict=True)),
            tuple(places[rows] for places, rows in zip(self.positions, kept, strict=True)),
        )
