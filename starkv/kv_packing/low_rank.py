# SPDX-License-Identifier: Apache-2.0
"""Low-rank caches: latents of keys and values; the newest rows as they are (STAR-KV, arXiv 2606.08382)."""

from dataclasses import dataclass

from starkv.kv_packing.positions import POSITION_BYTES
from starkv.lowrank.latent_format import KeyLanes, LatentFormat, key_bytes, value_bytes
from starkv.lowrank.layer import LowRankLayer


@dataclass(frozen=True)
class LowRankPacking:
    """How a model's rows become latents."""

    latent: LatentFormat
    layers: tuple[LowRankLayer, ...]
    recent_rows: int
    """Newest rows of a prompt that stay as they are, with those of the reply."""

    @property
    def rank_share(self) -> float:
        """Share of all channels that latents have."""
        ranks = sum(sum(factor.rank for factor in layer.keys) + layer.values.rank for layer in self.layers)
        return ranks / sum(2 * layer.key_bias.size for layer in self.layers)

    def lanes(self, layer: int) -> KeyLanes:
        """Where each group's latent lies in a row of keys."""
        return KeyLanes(tuple(factor.rank for factor in self.layers[layer].keys))

    def bytes_per_row(self, layer: int) -> int:
        """Bytes of one packed token in a layer, with scales, padding and its position."""
        factors = self.layers[layer]
        ranks = [factor.rank for factor in factors.keys]
        values = value_bytes(factors.values.rank, self.latent)
        return key_bytes(ranks, self.latent) + values + POSITION_BYTES
