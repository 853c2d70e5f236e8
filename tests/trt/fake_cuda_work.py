# SPDX-License-Identifier: Apache-2.0
"""What waits on a fake stream, and which memory it touches."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ranges = tuple[tuple[int, int], ...]
"""Address and size of each piece of memory."""


class CudaMisuseError(AssertionError):
    """What a real card would answer with garbage, or a crash."""


@dataclass(frozen=True)
class Work:
    """What waits on a stream, and the memory that it touches."""

    run: Callable[[], None]
    what: str
    reads: Ranges = ()
    writes: Ranges = ()

    def meets(self, other: "Work") -> bool:
        """Whether the order of both matters."""
        return (
            overlap(self.writes, other.writes)
            or overlap(self.writes, other.reads)
            or overlap(self.reads, other.writes)
        )


@dataclass
class Block:
    """An allocation."""

    raw: NDArray[np.uint8]
    size: int
    where: str
    """Line that allocated it."""


@dataclass
class FakeGraph:
    """Recorded work."""

    work: list[Work]
    alive: bool = True


def overlap(ones: Ranges, others: Ranges) -> bool:
    """Whether any piece of the one shares bytes with a piece of the other."""
    return any(a < b + m and b < a + n for a, n in ones for b, m in others if n and m)


def check_runs(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
) -> None:
    """Refuse what cudaMemcpy2DAsync leaves undefined.

    Raises:
        CudaMisuseError: nothing is copied, pitches are smaller than the width, or memory onto itself.
    """
    if not height:
        raise CudaMisuseError("a copy of nothing")
    if height > 1 and min(target_pitch, source_pitch) < width:
        raise CudaMisuseError("copied runs are wider than their distance")
    rows = np.arange(height)
    ends = target + rows * target_pitch + width
    begins = source + rows * source_pitch
    # The first written run that ends behind the beginning of each run that is read.
    first = np.minimum(np.searchsorted(ends, begins, side="right"), height - 1)
    begun = target + first * target_pitch
    if ((begun < begins + width) & (begins < begun + width)).any():
        raise CudaMisuseError("a copy onto itself")
