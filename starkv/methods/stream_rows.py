# SPDX-License-Identifier: Apache-2.0
"""Rows of a cache that goes on from step to step: a compacted history, different in every layer, and new rows
behind it, the same in every layer."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from starkv.methods.rows import (
    NO_FRAME,
    ROW_COLUMNS,
    ROW_FRAME,
    ROW_PROTECTED,
    ROW_TOKEN,
    Frame,
    PromptRows,
    most_protected,
)


@dataclass(frozen=True)
class StreamRows:
    """Row metadata of a history and of what was prefilled behind it.

    Offers what :class:`PromptRows` offers, so that compression treats both alike. Rows worth keeping are
    named by their tokens: a token's row differs from layer to layer.
    """

    history_meta: NDArray[np.int32]
    """``[L, H, 4]`` for H rows of the longest history, in whole-stream numbers."""
    history_lengths: NDArray[np.int32]
    """``[L]``: valid rows."""
    appended: PromptRows
    """The new rows, with screenshots and tokens counted from 0."""
    first_frame: int
    """Number of the first new screenshot in the stream."""
    first_token: int
    """Number of the first new token in the stream."""
    full_rows: int
    """Rows without any compression of what is in view: what a budget's share refers to, so that a step never
    keeps a fifth of a fifth."""
    protect_order: tuple[int, ...] = ()
    """Tokens worth keeping whatever their score, the most important first."""

    @property
    def length(self) -> int:
        """Rows of the longest layer."""
        return int(self.history_lengths.max()) + self.appended.length

    @property
    def shortest(self) -> int:
        """Rows of the shortest layer."""
        return int(self.history_lengths.min()) + self.appended.length

    @property
    def mean_rows(self) -> float:
        """Rows per layer."""
        return float(self.history_lengths.mean()) + self.appended.length

    @property
    def newest_rows(self) -> int:
        """Rows that were prefilled last: the observation window can't reach behind them."""
        return self.appended.length

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """``[L]``."""
        sums: NDArray[np.int32] = self.history_lengths + np.int32(self.appended.length)
        return sums

    @cached_property
    def row_meta(self) -> NDArray[np.int32]:
        """``[L, length, 4]``; −1 behind a layer's rows."""
        new = self.appended.row_meta.copy()
        new[new[:, ROW_FRAME] >= 0, ROW_FRAME] += self.first_frame
        new[:, ROW_TOKEN] += self.first_token
        meta = np.full((len(self.history_lengths), self.length, ROW_COLUMNS), -1, np.int32)
        for layer, rows in enumerate(self.history_lengths):
            meta[layer, :rows] = self.history_meta[layer, :rows]
            meta[layer, rows : rows + len(new)] = new
        return meta

    def newest_frame(self, window: int) -> Frame:
        """The last new screenshot with rows before the window; older ones are no runs of rows any more."""
        newest = self.appended.newest_frame(window)
        if not newest.cells:
            return NO_FRAME
        return Frame(
            newest.index + self.first_frame,
            newest.rows_to_end,
            newest.cells,
            newest.grid_rows,
            newest.grid_columns,
            newest.frames_in_view + self._older_frames,
        )

    @cached_property
    def _older_frames(self) -> int:
        """Screenshots of which any layer still has a row."""
        frames = [
            self.history_meta[layer, :rows, ROW_FRAME] for layer, rows in enumerate(self.history_lengths)
        ]
        return sum(1 for frame in np.unique(np.concatenate(frames)) if frame >= 0)

    def protected(self, kept_rows: int, window: int) -> tuple[int, ...]:
        """Tokens whose rows may not be evicted; see :meth:`PromptRows.protected`."""
        most = most_protected(kept_rows, window)
        past = self.first_token + self.appended.length - window
        return tuple(token for token in self.protect_order if token < past)[:most]

    def marked(self, protected: tuple[int, ...]) -> NDArray[np.int32]:
        """``row_meta`` with the rows of these tokens, and no others, marked as not to be evicted."""
        meta: NDArray[np.int32] = self.row_meta.copy()
        valid = np.arange(self.length) < self.lengths[:, None]
        marks = np.isin(meta[..., ROW_TOKEN], protected).astype(np.int32)
        meta[..., ROW_PROTECTED] = np.where(valid, marks, -1)
        return meta


CacheRows = PromptRows | StreamRows
"""Rows of a cache that is to be compressed."""
