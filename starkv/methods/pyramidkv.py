# SPDX-License-Identifier: Apache-2.0
"""PyramidKV (arXiv 2406.02069): SnapKV's scores, with most rows in the first layers
(docs/spec/baselines.md)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.budget import pyramid_rows
from starkv.methods.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose budget falls linearly from layer to layer.

    As in the official code all layers together hold a little more than ``L * kept_rows``.

    Raises:
        UsageError: a field makes no sense.
    """

    name: ClassVar[str] = "pyramidkv"
    beta: int = 20
    """The last layer keeps about this fraction of the mean, beside its window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise UsageError(f"beta must be at least 1, not {self.beta}")

    def keep_rows(
        self, layers: int, prompt_rows: int, kept_rows: int, window: int, sparsity: Tensor | None = None
    ) -> tuple[int, ...]:
        return pyramid_rows(layers, prompt_rows, kept_rows, window, self.beta)
