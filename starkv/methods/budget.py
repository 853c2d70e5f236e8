# SPDX-License-Identifier: Apache-2.0
"""How many rows a compressed cache may keep, in total and per layer. Host arithmetic, needs numpy alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError

LEAST_ROWS = 2
"""The smallest cache: one row that competed and one of the window."""


@dataclass(frozen=True)
class Budget:
    """Rows that a compressed prompt may hold: a share of it, an absolute number, or the smaller of both.

    Generated tokens come on top: they are never evicted within a reply.

    Raises:
        UsageError: the share is outside (0, 1], or the number is too small to hold a cache.
    """

    ratio: float = 1.0
    """Share of the prompt's rows (``--kv-budget``), the papers' meaning."""
    capacity: int | None = None
    """Most rows in any case (``--kv-capacity``)."""

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise UsageError(
                f"a KV budget is a share of the prompt in (0, 1], such as 0.2, not {self.ratio:g}; "
                "give absolute numbers of rows as --kv-capacity"
            )
        if self.capacity is not None and self.capacity < LEAST_ROWS:
            raise UsageError(f"a KV capacity must be at least {LEAST_ROWS} rows, not {self.capacity}")

    def rows(self, prompt_rows: int) -> int:
        """Rows to keep of ``prompt_rows``: the share rounded down, at least ``LEAST_ROWS``, never more than
        there are."""
        # 0.29 * 100 is 28.999…96: an exact share must not lose a row to binary fractions.
        share = int(np.floor(prompt_rows * self.ratio + 1e-9))
        most = share if self.capacity is None else min(share, self.capacity)
        return min(prompt_rows, max(LEAST_ROWS, most))


def window_rows(wanted: int, kept_rows: int) -> int:
    """Observation window that leaves at least two kept rows to compete for: ``max(1, min(wanted, kept − 2))``.

    The window's rows are always kept and lie inside the budget (spec star-kv.md §2).
    """
    return max(1, min(wanted, kept_rows - 2))


def pyramid_rows(
    layers: int, prompt_rows: int, kept_rows: int, window: int, beta: int = 20
) -> tuple[int, ...]:
    """Rows that each layer keeps under PyramidKV, its window included (spec baselines.md, PyramidKV).

    First layers keep the most. As in the official code the sum is not ``layers * kept_rows``: the step between
    layers is rounded down, so the pyramid is larger than its budget.
    """
    past, competing = prompt_rows - window, kept_rows - window
    if prompt_rows < kept_rows:
        return (prompt_rows,) * layers
    if prompt_rows < 2 * competing or layers == 1:
        return (kept_rows,) * layers
    least = competing // beta
    most = 2 * competing - least
    if most >= past:
        most = past
        least = 2 * competing - most
    step = (most - least) // (layers - 1)
    # A past shorter than a layer's share keeps all of it; a layer always keeps one row beside its window.
    return tuple(window + min(past, max(1, most - layer * step)) for layer in range(layers))


def proportional_rows(
    scales: NDArray[np.floating] | Sequence[float], total: int, floor: int, ceiling: int
) -> NDArray[np.int64]:
    """Divide ``total`` rows among layers in proportion to ``scales``, exactly.

    Where a layer would get less than ``floor`` or more than ``ceiling``, all shares are drawn towards equal
    ones until none does. Rounding is cumulative: layer i gets ``round(t_i) − round(t_{i−1})`` of the running
    total t, so that the sum is ``total`` and no share is off by a whole row.

    Args:
        scales: ``[L]``, positive.
        total: rows of all layers together; ``total / L`` must lie between floor and ceiling.
        floor: fewest rows of a layer.
        ceiling: most rows of a layer.
    """
    weights = np.asarray(scales, np.float64)
    relative = weights / weights.mean() - 1.0
    mean = total / len(weights)
    # Largest step from equal shares that keeps every layer inside the limits.
    up = (ceiling / mean - 1.0) / max(relative.max(), 1e-12)
    down = (1.0 - floor / mean) / max(-relative.min(), 1e-12)
    shares = mean * (1.0 + min(1.0, up, down) * relative)
    running = np.floor(np.cumsum(shares) + 0.5).astype(np.int64)
    running[-1] = total
    return np.diff(running, prepend=0)
