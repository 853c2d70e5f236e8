# SPDX-License-Identifier: Apache-2.0
"""An oracle that knows which rows matter, such as those of the element to click. For tests and benchmarks."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.method import KvMethod
from starkv.methods.prefill import Prefill


@dataclass(frozen=True)
class Oracle(KvMethod):
    """Keeps the window, then the given rows, then the most recent ones.

    Where not all given rows fit, the later ones stay.

    Raises:
        UsageError: a field makes no sense.
    """

    name: ClassVar[str] = "oracle"
    rows: tuple[int, ...] = ()
    """Rows of the uncompressed prompt, the same in all layers and sequences."""
    window: int = 8

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"window must be at least 1, not {self.window}")
        if min(self.rows, default=0) < 0:
            raise UsageError(f"rows must not be negative, but one is {min(self.rows)}")

    def score(self, prefill: Prefill, kept_rows: int) -> Tensor:
        row = prefill.row
        if max(self.rows, default=0) >= len(row):
            raise UsageError(f"row {max(self.rows)} lies outside the cache of {len(row)} rows")
        known = torch.tensor(self.rows, dtype=torch.long, device=row.device)
        first = torch.zeros_like(row).index_fill_(0, known, len(row))
        # Row numbers are exact in float32 up to 2^24.
        scores = (row + first).float()
        return scores.expand(*prefill.kv_len.shape, 1, -1)
