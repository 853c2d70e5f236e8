# SPDX-License-Identifier: Apache-2.0
"""Rows of one sequence in host memory, while it waits for its next turn or in a file.

A parked sequence takes what its rows take, no slot and no capacity, and goes into any arena or slot of an
engine of the same model and dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.methods.rows import ROW_COLUMNS, ROW_FRAME, ROW_TOKEN

Arrays = tuple[NDArray[Any], ...]


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
        return stacked(self.row_meta)

    def without_frames_before(self, frame: int) -> "ParkedRows":
        """The rows but those of screenshots before number ``frame``: how a window slides over them."""
        return self.take(
            [
                np.flatnonzero((meta[:, ROW_FRAME] < 0) | (meta[:, ROW_FRAME] >= frame))
                for meta in self.row_meta
            ]
        )

    def take(self, rows: Sequence[NDArray[np.integer]]) -> "ParkedRows":
        """Some rows of each layer, in that order; ``rows`` has L times their numbers."""
        return ParkedRows(
            tuple(keys[:, some] for keys, some in zip(self.keys, rows, strict=True)),
            tuple(values[:, some] for values, some in zip(self.values, rows, strict=True)),
            tuple(meta[some] for meta, some in zip(self.row_meta, rows, strict=True)),
            tuple(places[some] for places, some in zip(self.positions, rows, strict=True)),
        )

    def merged(self, others: "ParkedRows") -> "ParkedRows":
        """These rows and others of the same sequence, in the order of their tokens.

        Raises:
            ValueError: the others are of another dtype or of other layers, so no rows of the same cache.
        """
        if [keys.dtype for keys in self.keys] != [keys.dtype for keys in others.keys]:
            raise ValueError("parked rows of another dtype or of other layers can't be merged")

        def both(mine: Arrays, theirs: Arrays, axis: int) -> Arrays:
            return tuple(np.concatenate(pair, axis) for pair in zip(mine, theirs, strict=True))

        joined = ParkedRows(
            both(self.keys, others.keys, 1),
            both(self.values, others.values, 1),
            both(self.row_meta, others.row_meta, 0),
            both(self.positions, others.positions, 0),
        )
        return joined.take([in_order(meta) for meta in joined.row_meta])

    def merged_meta(self, others: "ParkedRows") -> tuple[NDArray[np.int32], ...]:
        """``row_meta`` that :meth:`merged` would have, whatever the keys' dtypes."""
        both = [np.concatenate(pair) for pair in zip(self.row_meta, others.row_meta, strict=True)]
        return tuple(meta[in_order(meta)] for meta in both)


def in_order(meta: NDArray[np.int32]) -> NDArray[np.int64]:
    """Order of the tokens of a layer's rows ``[rows, 4]``."""
    return np.argsort(meta[:, ROW_TOKEN], kind="stable")


def stacked(metas: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """``row_meta`` of layers of different lengths as ``[L, H, 4]``, −1 behind the shorter ones' last row."""
    longest = max(map(len, metas), default=0)
    stack = np.full((len(metas), longest, ROW_COLUMNS), -1, np.int32)
    for layer, meta in enumerate(metas):
        stack[layer, : len(meta)] = meta
    return stack
