# SPDX-License-Identifier: Apache-2.0
"""Random rows: what a method has to beat to show that its scores mean anything."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.method import KvMethod
from starkv.methods.prefill import Prefill


@dataclass(frozen=True)
class RandomRows(KvMethod):
    """Uniform random scores, drawn anew for every layer.

    They come from NumPy's generator on the host: the same rows on every device, and the same as in the
    engines, which know no PyTorch.

    Raises:
        UsageError: a field makes no sense.
    """

    name: ClassVar[str] = "random"
    window: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"window must be at least 1, not {self.window}")
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, but is {self.seed}")

    def score(self, prefill: Prefill, kept_rows: int) -> Tensor:
        layers, batch = prefill.kv_len.shape
        capacity = prefill.keys.shape[3]
        drawn = np.random.default_rng(self.seed).random((layers, batch, capacity), np.float32)
        return torch.from_numpy(drawn).to(prefill.keys.device)[:, :, None]
