# SPDX-License-Identifier: Apache-2.0
"""What STaR-KV remembers of a trajectory, as tensors."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starkv.methods.star_kv_plan import StarKVProgress


@dataclass(frozen=True)
class StarKVState:
    """What one trajectory remembers between prompts."""

    progress: StarKVProgress
    mi_ema: Tensor
    """``[L, B, G]`` f32: moving average of each group's spatial information."""
    pattern_ema: Tensor
    """``[L, B, G, N]`` f32: moving average of each group's attention over the newest screenshot."""
    temperature: Tensor
    """``[L, B]`` f32: last entropy temperature."""

    @classmethod
    def initial(
        cls, layers: int, batch: int, groups: int, device: torch.device | str = "cpu"
    ) -> "StarKVState":
        """State before the first prompt of a trajectory."""
        zeros = torch.zeros(layers, batch, groups, device=device)
        ones = torch.ones(layers, batch, device=device)
        return cls(StarKVProgress(), zeros, zeros.new_zeros(layers, batch, groups, 0), ones)

    def next_sample(self) -> "StarKVState":
        """Forget the trajectory as the official drivers do, see :meth:`StarKVProgress.next_sample`."""
        return replace(self, progress=self.progress.next_sample())
