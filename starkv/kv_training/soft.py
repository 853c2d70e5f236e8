# SPDX-License-Identifier: Apache-2.0
"""Factors of full rank whose channels a soft threshold cuts off: what the first phase trains."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.lowrank.objective import LayerThresholds
from starkv.lowrank.plan import FLOOR
from starkv.lowrank.soft_threshold import soft_threshold

OPEN_THRESHOLD = -0.2
"""Where thresholds begin: so far below every strength that no channel is damped."""
CLEARANCE = 0.05
"""So far above a threshold a strength passes nearly whole."""


@dataclass(frozen=True)
class SoftPart:
    """A group's keys or a layer's values. All tensors are float32 and of full rank."""

    up: Tensor
    """``[width, full rank]``."""
    down: Tensor
    """``[full rank, width]``."""
    gains: Tensor
    """``[full rank]``: 1 at first; what channels are multiplied by if nothing is cut. Trained in place of
    strengths, so that a step changes strong and weak channels by the same share."""
    threshold: Tensor
    """Scalar."""
    first_strengths: Tensor
    """``[full rank]``: strengths before training; not trained."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All fields, in their order."""
        return self.up, self.down, self.gains, self.threshold, self.first_strengths

    @property
    def strengths(self) -> Tensor:
        """``[full rank]``: what the threshold is compared with."""
        return self.gains * self.first_strengths

    def rebuild(self, outputs: Tensor) -> Tensor:
        """``[..., width]`` of what a projection put out, ``[..., width]``."""
        left = soft_threshold(self.strengths, self.threshold) / self.first_strengths
        latents = outputs.float() @ self.down.T * left
        return (latents @ self.up.T).to(outputs.dtype)

    def keep_floor(self) -> None:
        """Lower the threshold so far that the least rank is left."""
        with torch.no_grad():
            strongest = self.strengths.topk(min(FLOOR + 1, len(self.strengths))).values.tolist()
            # Far enough below the last one that stays for it to pass, if the next one is not nearer.
            least = strongest[min(FLOOR, len(strongest)) - 1] - CLEARANCE
            self.threshold.clamp_(max=max(least, *strongest[FLOOR:], -math.inf))


@dataclass(frozen=True)
class SoftLayer:
    """Parts of one layer."""

    keys: tuple[SoftPart, ...]
    """One per group of KV heads."""
    values: SoftPart

    @property
    def parts(self) -> tuple[SoftPart, ...]:
        """All of them, keys first."""
        return (*self.keys, self.values)

    @property
    def thresholds(self) -> LayerThresholds:
        """As the budget sees them."""
        return LayerThresholds(
            torch.stack([part.strengths for part in self.keys]),
            torch.stack([part.threshold for part in self.keys]),
            self.values.strengths,
            self.values.threshold,
        )


class SoftFactors:
    """Compression of all layers in the first phase."""

    def __init__(self, layers: Sequence[SoftLayer]) -> None:
        self.layers = tuple(layers)

    @property
    def parts(self) -> Iterator[SoftPart]:
        """All parts of all layers."""
        for layer in self.layers:
            yield from layer.parts

    @property
    def thresholds(self) -> list[LayerThresholds]:
        """As the budget sees them."""
        return [layer.thresholds for layer in self.layers]

    def keys(self, layer: int, outputs: Tensor) -> Tensor:
        parts = self.layers[layer].keys
        pieces = outputs.split([len(part.up) for part in parts], dim=-1)
        return torch.cat([part.rebuild(piece) for part, piece in zip(parts, pieces, strict=True)], dim=-1)

    def values(self, layer: int, outputs: Tensor) -> Tensor:
        return self.layers[layer].values.rebuild(outputs)

    def require_gradients(self) -> "SoftFactors":
        """Make factors, strengths and thresholds trainable."""
        for part in self.parts:
            for tensor in (part.up, part.down, part.gains, part.threshold):
                tensor.requires_grad_()
        return self
