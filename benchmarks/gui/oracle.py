# SPDX-License-Identifier: Apache-2.0
"""The oracle: keeps what the answer is about, because it knows it. How far a budget could reach.

It bounds the choice of rows from above only as far as the annotated evidence is what the model needs.
"""

import numpy as np
from numpy.typing import NDArray
from prefilled import Prefilled

from starkv.errors import UsageError
from starkv.methods.budget import window_rows
from starkv.runtime.kv.buffers import Arena, Pool

WINDOW = 8
"""Last rows, which every method keeps."""


def oracle_rows(asked: Prefilled, kept_rows: int) -> NDArray[np.int64]:
    """Rows of the prompt that the oracle keeps, ascending.

    In this order, as far as the budget reaches: the observation window, the tokens that the evidence touches,
    sinks and text (in at most half of the budget, as STaR-KV protects them), the tokens nearest to the
    evidence, the latest rows.

    Args:
        asked: the question.
        kept_rows: how many.
    """
    prompt = asked.prompt
    length, window = prompt.length, window_rows(WINDOW, kept_rows)
    distance = _distances(asked)
    near = np.flatnonzero(np.isfinite(distance))
    near = near[np.argsort(distance[near], kind="stable")]
    touched = near[distance[near] == 0]
    order = dict.fromkeys(range(length - 1, length - 1 - window, -1))
    order |= dict.fromkeys(touched.tolist())
    order |= dict.fromkeys(prompt.protected(kept_rows, window))
    order |= dict.fromkeys(near.tolist())
    order |= dict.fromkeys(range(length - 1, -1, -1))
    return np.sort(np.array(list(order)[:kept_rows], np.int64))


def _distances(asked: Prefilled) -> NDArray[np.float64]:
    """``[S]``: how far each row's token lies from the nearest evidence on its screenshot, in tokens; 0 where
    they touch, infinite for text and for screenshots without evidence."""
    found = np.full(asked.prompt.length, np.inf)
    height, width = asked.sample.frames[-1].shape[:2]
    for frame, (x0, y0, x1, y1) in asked.sample.evidence:
        (start, end), (rows, columns) = asked.prompt.spans[frame], asked.prompt.grids[frame]
        row, column = np.divmod(np.arange(end - start), columns)
        # Gaps between intervals of pixels, measured in tokens; what overlaps has none.
        across = _gap(column, x0 * columns / width, x1 * columns / width)
        down = _gap(row, y0 * rows / height, y1 * rows / height)
        found[start:end] = np.minimum(found[start:end], np.hypot(across, down))
    return found


def _gap(cell: NDArray[np.int64], first: float, last: float) -> NDArray[np.float64]:
    """From the interval ``[cell, cell + 1)`` to ``[first, last)``. A cell that only borders on it is one
    away, not zero: it shows nothing of it."""
    overlaps = (cell < last) & (cell + 1 > first)
    return np.where(overlaps, 0.0, np.maximum(np.floor(first) - cell, cell + 1 - np.ceil(last)))


def keep_rows(arena: Arena, pool: Pool, handle: int, rows: NDArray[np.int64]) -> None:
    """Copy given rows of all layers into a sequence of a pool, both in host memory.

    Args:
        arena: a prefilled prompt.
        pool: where to.
        handle: the sequence in it.
        rows: ascending.

    Raises:
        UsageError: they don't fit the slot, or the memory is another device's.
    """
    source, target, slot = arena.host_kv, pool.host_kv, pool.slot_of(handle)
    if len(rows) > pool.kv.capacity:
        raise UsageError(f"{len(rows)} rows do not fit a slot of {pool.kv.capacity}")
    target.keys[:, slot, :, : len(rows)] = source.keys[:, 0][:, :, rows]
    target.values[:, slot, :, : len(rows)] = source.values[:, 0][:, :, rows]
    pool.kv.lengths[:, slot] = len(rows)
