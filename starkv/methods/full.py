# SPDX-License-Identifier: Apache-2.0
"""The full cache: every row stays. What all other methods are measured against."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from starkv.methods.method import KvMethod
from starkv.methods.prefill import Prefill


@dataclass(frozen=True)
class Full(KvMethod):
    """Keeps everything, whatever the budget."""

    name: ClassVar[str] = "full"
    window: int = 1

    def keep_rows(
        self, layers: int, prompt_rows: int, kept_rows: int, window: int, sparsity: Tensor | None = None
    ) -> tuple[int, ...]:
        return (prompt_rows,) * layers

    def score(self, prefill: Prefill, kept_rows: int) -> Tensor:
        return prefill.is_past[:, :, None].float()
