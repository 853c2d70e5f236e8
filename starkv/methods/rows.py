# SPDX-License-Identifier: Apache-2.0
"""What is known of each cached row beside its key and value, and where the newest screenshot lies.

Row and token are different things once a cache is compacted, and every layer keeps other rows, so this
travels with the rows as one int32 tensor ``row_meta [L, B, C, 4]`` that is gathered like a key of four
numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError

ROW_FRAME, ROW_CELL, ROW_PROTECTED, ROW_TOKEN = range(4)
"""Columns of ``row_meta``: screenshot (−1 for text), cell in its grid in reading order (−1 for text), 1 where
the row may not be evicted, index of the token in the uncompressed sequence."""
ROW_COLUMNS = 4
TEXT_FRAME = -1


@dataclass(frozen=True)
class Frame:
    """Where the newest screenshot lies. Its rows are consecutive: it has just been prefilled."""

    index: int
    """Its number in ``row_meta``; older screenshots have lower ones."""
    rows_to_end: int
    """Rows from its first one to the end of the sequence, the same in every layer."""
    cells: int
    """How many of its rows compete: those in the observation window do not. 0: there is no screenshot."""
    grid_rows: int
    grid_columns: int
    frames_in_view: int
    """Screenshots with competing rows, this one included."""

    def as_array(self) -> NDArray[np.int32]:
        """``frame [5] i32`` of the ONNX operators: index, rows to the end, cells, grid rows and columns."""
        fields = (self.index, self.rows_to_end, self.cells, self.grid_rows, self.grid_columns)
        return np.array(fields, np.int32)


NO_FRAME = Frame(index=TEXT_FRAME, rows_to_end=0, cells=0, grid_rows=1, grid_columns=1, frames_in_view=0)


PROTECTED_SHARE = 4
"""One row of so many beside the window may be protected: where few are kept, scores choose better."""


def most_protected(kept_rows: int, window: int) -> int:
    """Most rows that may be protected from eviction."""
    return max(0, (kept_rows - window) // PROTECTED_SHARE)


@dataclass(frozen=True)
class PromptRows:
    """Row metadata of an uncompressed prompt, the same in every layer."""

    row_meta: NDArray[np.int32]
    """``[S, 4]``."""
    spans: tuple[tuple[int, int], ...]
    """First row and end of each screenshot."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of its tokens."""
    protect_order: tuple[int, ...] = ()
    """Rows worth keeping whatever their score, the most important first: attention sinks, instruction, system
    prompt."""

    @property
    def length(self) -> int:
        return len(self.row_meta)

    @property
    def lengths(self) -> int:
        """Rows of each layer: all have the same."""
        return self.length

    @property
    def shortest(self) -> int:
        """Rows of the shortest layer."""
        return self.length

    @property
    def mean_rows(self) -> float:
        """Rows per layer."""
        return self.length

    @property
    def newest_rows(self) -> int:
        """Rows that were prefilled last: all of them."""
        return self.length

    @property
    def full_rows(self) -> int:
        """Rows without any compression: what a budget's share refers to."""
        return self.length

    def newest_frame(self, window: int) -> Frame:
        """The last screenshot with rows before the observation window."""
        past = self.length - window
        competing = [(start, min(end, past)) for start, end in self.spans if start < past]
        if not competing:
            return NO_FRAME
        start, end = competing[-1]
        index = len(competing) - 1
        return Frame(index, self.length - start, end - start, *self.grids[index], len(competing))

    def protected(self, kept_rows: int, window: int) -> tuple[int, ...]:
        """Rows that may not be evicted: as many of ``protect_order`` as a share of the kept rows beside the
        window can hold. Rows of the window are kept anyway and use up none of them."""
        most = most_protected(kept_rows, window)
        past = self.length - window
        return tuple(row for row in self.protect_order if row < past)[:most]

    def marked(self, protected: Sequence[int]) -> NDArray[np.int32]:
        """``row_meta`` with these rows marked as not to be evicted."""
        meta: NDArray[np.int32] = self.row_meta.copy()
        meta[list(protected), ROW_PROTECTED] = 1
        return meta


def prompt_rows(
    length: int,
    spans: Sequence[tuple[int, int]],
    grids: Sequence[tuple[int, int]],
    protect_order: Sequence[int] = (),
) -> PromptRows:
    """Metadata of a prompt with screenshots.

    Args:
        length: rows of the prompt.
        spans: first row and end of each screenshot's tokens, in order.
        grids: rows and columns of tokens of each screenshot.
        protect_order: rows worth keeping, the most important first.

    Raises:
        UsageError: a span is empty, lies outside the prompt or before the end of an earlier one, or doesn't
            hold its grid.
    """
    if len(spans) != len(grids):
        raise UsageError(f"{len(spans)} screenshot spans, but {len(grids)} grids")
    meta = np.empty((length, ROW_COLUMNS), np.int32)
    meta[:, ROW_FRAME] = meta[:, ROW_CELL] = -1
    meta[:, ROW_PROTECTED] = 0
    meta[:, ROW_TOKEN] = np.arange(length)
    previous = 0
    for index, ((start, end), (rows, columns)) in enumerate(zip(spans, grids, strict=True)):
        if not previous <= start < end <= length:
            raise UsageError(
                f"screenshot {index}: span [{start}, {end}) must be non-empty, behind row {previous} and "
                f"inside the prompt of {length} rows"
            )
        if end - start != rows * columns:
            raise UsageError(f"screenshot {index}: {end - start} rows are no grid of {rows}x{columns}")
        meta[start:end, ROW_FRAME] = index
        meta[start:end, ROW_CELL] = np.arange(end - start)
        previous = end
    return PromptRows(
        meta,
        tuple((int(start), int(end)) for start, end in spans),
        tuple((int(rows), int(columns)) for rows, columns in grids),
        tuple(int(row) for row in protect_order),
    )


def square_grid(cells: int) -> tuple[int, int]:
    """The grid that the official code assumes for any screenshot: nearly square, whatever its real shape.

    Rows are ``max(1, round(sqrt(cells)))`` with Python's banker's rounding (docs/spec/star-kv.md §4.2).
    """
    rows = max(1, round(float(np.sqrt(cells))))
    return rows, max(1, -(-cells // rows))


def official_rows(length: int, spans: Sequence[tuple[int, int]], window: int) -> PromptRows:
    """Metadata as the official code sees a prompt: spans clamped to the rows before the window, empty ones
    dropped, later ones over earlier ones, square grids (docs/spec/star-kv.md §3).

    Never raises: spans outside the prompt are dropped, as there.
    """
    past = length - window
    clamped = []
    for start, end in spans:
        first = max(0, min(int(start), past))
        last = max(first, min(int(end), past))
        if last > first:
            clamped.append((first, last))
    meta = np.full((length, ROW_COLUMNS), -1, np.int32)
    meta[:, ROW_PROTECTED] = 0
    meta[:, ROW_TOKEN] = np.arange(length)
    for index, (first, last) in enumerate(clamped):
        meta[first:last, ROW_FRAME] = index
        meta[first:last, ROW_CELL] = np.arange(last - first)
    grids = tuple(square_grid(last - first) for first, last in clamped)
    return PromptRows(meta, tuple(clamped), grids)
