# SPDX-License-Identifier: Apache-2.0
"""Where cached rows stand in their sequence: a row's number says nothing of it once rows were dropped.

Symbols: B sequences, C rows of capacity, D head dim, P positions that the tables know.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.tensor_checks import check_tensors


@dataclass
class CachedPositions:
    """M-RoPE positions of a cache's rows, and the angles that positions stand for."""

    positions: Tensor
    """``[B, C, 3]`` i32: t, h, w of each row; equal for text, and for models with one position per token."""
    cosines: Tensor
    """``[P, D/2]`` f32: of position times inverse frequency. A row with a position outside of the table comes
    out as NaN."""
    sines: Tensor
    """``[P, D/2]`` f32."""
    sections: tuple[int, int, int]
    """How many pairs (i, i + D/2) turn by t, by h and by w, in this order: (16, 24, 24) for Qwen2.5-VL."""

    def check(self, batch: int, capacity: int, head_dim: int) -> None:
        """Refuse tensors that don't fit the cache.

        Raises:
            UsageError: names the tensor and what it should be.
        """
        if len(self.sections) != 3 or min(self.sections) < 0 or 2 * sum(self.sections) != head_dim:
            raise UsageError(
                f"sections {self.sections} don't share {head_dim // 2} rotary pairs among t, h, w"
            )
        if self.cosines.dim() != 2 or not len(self.cosines):
            raise UsageError("cosines must be [P, D/2] with at least one position")
        table = (torch.float32, (len(self.cosines), head_dim // 2))
        positions = (torch.int32, (batch, capacity, 3))
        check_tensors(self, {"positions": positions, "cosines": table, "sines": table})

    def angles(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a sequence's rows, each ``[C, D/2]``; NaN for positions outside of the
        tables."""
        component = torch.repeat_interleave(
            torch.arange(3, device=self.positions.device),
            torch.tensor(self.sections, device=self.positions.device),
        )
        position = self.positions[sequence].long()[:, component]
        known = (position >= 0) & (position < len(self.cosines))
        position = position.clamp(0, len(self.cosines) - 1)
        cosines, sines = (
            table.gather(0, position).masked_fill(~known, torch.nan) for table in (self.cosines, self.sines)
        )
        return cosines, sines


def rotate(vectors: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of ``vectors [..., D]`` by angles ``[..., D/2]``."""
    first, second = vectors.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)
