# SPDX-License-Identifier: Apache-2.0
"""How many rows a compressed cache may keep, in total and per layer. Host arithmetic."""

import math
from dataclasses import dataclass

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

    def spares(self, prompt_rows: int) -> bool:
        """Whether a prompt stays as it is because it is shorter than the capacity.

        A prompt of a whole budget (1.0) is compressed all the same, to all of its rows: so it counts in what
        the method remembers of a trajectory, as in the official code.
        """
        return self.ratio == 1.0 and self.capacity is not None and prompt_rows < self.capacity

    def rows(self, prompt_rows: int) -> int:
        """Rows to keep of ``prompt_rows``: the share rounded down, at least ``LEAST_ROWS``, never more than
        there are."""
        # 0.29 * 100 is 28.999…96: an exact share must not lose a row to binary fractions.
        share = math.floor(prompt_rows * self.ratio + 1e-9)
        most = share if self.capacity is None else min(share, self.capacity)
        return min(prompt_rows, max(LEAST_ROWS, most))


def window_rows(wanted: int, kept_rows: int) -> int:
    """Observation window that leaves at least two kept rows to compete for: ``max(1, min(wanted, kept −
    2))``.

    The window's rows are always kept and lie inside the budget (docs/spec/star-kv.md §2).
    """
    return max(1, min(wanted, kept_rows - 2))


def pyramid_rows(
    layers: int, prompt_rows: int, kept_rows: int, window: int, beta: int = 20
) -> tuple[int, ...]:
    """Rows that each layer keeps under PyramidKV, its window included (docs/spec/baselines.md, PyramidKV).

    First layers keep the most. As in the official code the sum is not ``layers * kept_rows``: the step
    between layers is rounded down, so the pyramid is larger than its budget.
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
