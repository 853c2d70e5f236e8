# SPDX-License-Identifier: Apache-2.0
"""Factors of settled ranks, cut channels gone: what the second phase trains, and what is deployed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_training.fake_quant import fake_quantize
from starkv.kv_training.soft import SoftFactors, SoftPart
from starkv.lowrank.factor import Factor
from starkv.lowrank.hadamard import random_rotation
from starkv.lowrank.latent_format import FLOAT32, TILE, LatentFormat, key_bytes, value_bytes
from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.objective import kept_ranks

Biases = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Of a layer's key and value projections, ``[KV heads, D]`` each."""


@dataclass(frozen=True)
class PinnedPart:
    """A group's keys or a layer's values, float32."""

    up: Tensor
    """``[width, rank]``."""
    down: Tensor
    """``[rank, width]``."""
    rotation: Tensor
    """``[rank, rank]``: what latents are turned by before they are quantized."""

    def rebuild(self, outputs: Tensor, latent: LatentFormat) -> Tensor:
        """``[..., width]`` of what a projection put out, ``[..., width]``."""
        latents = outputs.float() @ self.down.T
        if latent.quantized:
            latents = fake_quantize(latents @ self.rotation, latent) @ self.rotation.T
        return (latents @ self.up.T).to(outputs.dtype)

    @property
    def factor(self) -> Factor:
        """As the runtime takes it, before rotation."""
        up, down = (matrix.detach().cpu().double().numpy() for matrix in (self.up, self.down))
        return Factor(up, down)


@dataclass(frozen=True)
class PinnedLayer:
    """Parts of one layer."""

    keys: tuple[PinnedPart, ...]
    values: PinnedPart


class PinnedFactors:
    """Compression of all layers in the second phase; latents are quantized where the format says so."""

    def __init__(self, layers: Sequence[PinnedLayer], latent: LatentFormat) -> None:
        self.layers, self.latent = tuple(layers), latent

    @classmethod
    def of_packing(
        cls, packing: LowRankPacking, latent: LatentFormat, device: str = "cpu"
    ) -> "PinnedFactors":
        """Factors of a packing of float latents, so that it can be judged as training judges."""
        layers = []
        for layer in packing.layers:
            keys = tuple(_of_factor(factor, device) for factor in layer.keys)
            layers.append(PinnedLayer(keys, _of_factor(layer.values, device)))
        return cls(layers, latent)

    @property
    def parts(self) -> Iterator[PinnedPart]:
        """All parts of all layers."""
        for layer in self.layers:
            yield from (*layer.keys, layer.values)

    @property
    def trained(self) -> list[Tensor]:
        """Both factors of every part."""
        return [matrix for part in self.parts for matrix in (part.up, part.down)]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's latents over all layers, scales and padding counted."""
        return sum(
            key_bytes([part.up.shape[1] for part in layer.keys], self.latent)
            + value_bytes(layer.values.up.shape[1], self.latent)
            for layer in self.layers
        )

    def keys(self, layer: int, outputs: Tensor) -> Tensor:
        parts = self.layers[layer].keys
        pieces = outputs.split([len(part.up) for part in parts], dim=-1)
        rebuilt = [part.rebuild(piece, self.latent) for part, piece in zip(parts, pieces, strict=True)]
        return torch.cat(rebuilt, dim=-1)

    def values(self, layer: int, outputs: Tensor) -> Tensor:
        return self.layers[layer].values.rebuild(outputs, self.latent)

    def packing(self, biases: Sequence[Biases], recent_rows: int) -> LowRankPacking:
        """The factors with float latents, whatever they were trained for."""
        layers = []
        for layer, pair in zip(self.layers, biases, strict=True):
            key_bias, value_bias = (bias.astype(np.float64) for bias in pair)
            keys = tuple(part.factor for part in layer.keys)
            layers.append(LowRankLayer(keys, layer.values.factor, key_bias, value_bias))
        return LowRankPacking(FLOAT32, tuple(layers), recent_rows)


def pin(soft: SoftFactors, latent: LatentFormat, budget: int) -> PinnedFactors:
    """Settle ranks by the thresholds, fold strengths into ``down``, and drop what is cut.

    Keys are rounded up to whole tiles, which they take anyway. What the budget has left goes to the strongest
    channels of values that were cut.

    Args:
        soft: trained so far that they meet the budget.
        latent: how latents are stored.
        budget: bytes per token over all layers.
    """
    ranks = []
    for layer in soft.layers:
        *keys, values = (max(1, int(kept_ranks(part.strengths, part.threshold))) for part in layer.parts)
        tiled = [
            min(-(-rank // TILE) * TILE, len(part.strengths))
            for rank, part in zip(keys, layer.keys, strict=True)
        ]
        ranks.append((tiled, values))
    value_ranks = _grown(soft, [keys for keys, _ in ranks], [values for _, values in ranks], latent, budget)
    return PinnedFactors(
        [
            PinnedLayer(
                tuple(_pruned(part, rank) for part, rank in zip(layer.keys, keys, strict=True)),
                _pruned(layer.values, rank),
            )
            for layer, (keys, _), rank in zip(soft.layers, ranks, value_ranks, strict=True)
        ],
        latent,
    )


def masked_gains(part: SoftPart, rank: int) -> Tensor:
    """``[full rank]``: gains with the strongest channels as they are and the others cut."""
    strongest = part.strengths.topk(rank).indices
    return torch.zeros_like(part.gains).scatter(0, strongest, part.gains[strongest])


def _grown(
    soft: SoftFactors, keys: Sequence[Sequence[int]], values: Sequence[int], latent: LatentFormat, budget: int
) -> list[int]:
    """Ranks of values, raised channel by channel as far as the budget allows."""
    grown = list(values)
    used = sum(key_bytes(k, latent) + value_bytes(v, latent) for k, v in zip(keys, values, strict=True))
    sorted_strengths = [
        layer.values.strengths.detach().sort(descending=True).values.tolist() for layer in soft.layers
    ]
    cut = [
        (-strength, layer)
        for layer, (strengths, rank) in enumerate(zip(sorted_strengths, values, strict=True))
        for strength in strengths[rank:]
    ]
    for _, layer in sorted(cut):
        extra = value_bytes(grown[layer] + 1, latent) - value_bytes(grown[layer], latent)
        if used + extra <= budget:
            grown[layer] += 1
            used += extra
    return grown


def _pruned(part: SoftPart, rank: int) -> PinnedPart:
    with torch.no_grad():
        strongest = part.strengths.topk(rank).indices
        gains = masked_gains(part, rank)[strongest]
        up, down = part.up[:, strongest].clone(), (gains[:, None] * part.down[strongest]).clone()
    return PinnedPart(up, down, _rotation(rank, up.device))


def _of_factor(factor: Factor, device: str) -> PinnedPart:
    up, down = (torch.from_numpy(matrix).float().to(device) for matrix in (factor.up, factor.down))
    return PinnedPart(up, down, _rotation(factor.rank, up.device))


def _rotation(rank: int, device: torch.device) -> Tensor:
    return torch.from_numpy(random_rotation(rank)).float().to(device)
