# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM (arXiv 2309.17453): the first rows, which soak up attention, and the most recent ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.method import KvMethod
from starkv.methods.prefill import Prefill
from starkv.methods.rows import PromptRows


@dataclass(frozen=True)
class StreamingLLM(KvMethod):
    """First ``n_sink`` rows, then from the end backwards.

    The last row stays even where the budget has room for the first ones alone.

    Raises:
        UsageError: ``n_sink`` is negative.
    """

    name: ClassVar[str] = "streaming_llm"
    window: int = 1
    n_sink: int = 4

    def __post_init__(self) -> None:
        if self.n_sink < 0:
            raise UsageError(f"n_sink must not be negative, but is {self.n_sink}")

    def window_for(self, prompt: PromptRows, kept_rows: int) -> int:
        return self.window

    def score(self, prefill: Prefill, kept_rows: int) -> Tensor:
        row = prefill.row
        # Row numbers are exact in float32 up to 2^24.
        recency = torch.where(row < self.n_sink, 2 * len(row) - row, row).float()
        return recency.expand(*prefill.kv_len.shape, 1, -1)
