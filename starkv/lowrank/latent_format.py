# SPDX-License-Identifier: Apache-2.0
"""How a row of latents is laid out in memory, and its exact size in bytes.

Keys: the latents of all groups lie side by side, each filled up to whole tiles of 16 lanes. Values: one
latent for all heads. In both a latent's channels are sorted by strength and split into two blocks, *outliers*
(the first fifth) and *inliers*; quantized, each block of each token has a scale of its own (STAR-KV, arXiv
2606.08382).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE = 16
"""Lanes that a kernel lifts at once: every group's keys start at a multiple of it."""
SCALE_BYTES = 2
"""Scales are bfloat16."""
ROW_ALIGNMENT = 8
"""Quantized value rows are filled up to a multiple of so many bytes."""


@dataclass(frozen=True)
class LatentFormat:
    """How one lane of a latent is stored."""

    name: str
    lane_bits: int
    """Memory per lane: 4 (two lanes per byte, the even one first), 8 (signed), 16 or 32 (floats)."""
    outlier_bits: int
    """Precision of the codes; 3 bits still lie in 4."""
    inlier_bits: int

    @property
    def quantized(self) -> bool:
        """Whether rows are codes with scales."""
        return self.lane_bits <= 8


NIBBLES_4_3 = LatentFormat("4/3", 4, 4, 3)
"""As published: outliers of 4 bits, inliers of 3."""
NIBBLES = LatentFormat("4/4", 4, 4, 4)
"""Inliers use the bit that 4/3 leaves idle: the same bytes, a smaller error."""
INT8 = LatentFormat("int8", 8, 8, 8)
FLOAT16 = LatentFormat("float16", 16, 16, 16)
"""Latents as they are, in float16 or bfloat16."""
FLOAT32 = LatentFormat("float32", 32, 32, 32)
FORMATS = {latent.name: latent for latent in (NIBBLES_4_3, NIBBLES, INT8, FLOAT16, FLOAT32)}


def outliers(rank: int) -> int:
    """Channels of a latent in its outlier block: a fifth, rounded down."""
    return rank // 5


@dataclass(frozen=True)
class KeyLanes:
    """Where each group's latent lies in a row of keys.

    Raises:
        ValueError: there is no group, or one of no rank.
    """

    ranks: tuple[int, ...]
    """Rank of each group."""

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"every group of keys needs a rank of at least 1, not {self.ranks}")

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Lanes of each group, filled up to whole tiles."""
        return tuple(-(-rank // TILE) * TILE for rank in self.ranks)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First lane of each group."""
        return tuple(sum(self.widths[:group]) for group in range(len(self.ranks)))

    @property
    def lanes(self) -> int:
        """Lanes of a row."""
        return sum(self.widths)

    @cached_property
    def group_of_tile(self) -> NDArray[np.int32]:
        """``[lanes / 16]``: whose lanes each tile holds."""
        groups = np.arange(len(self.ranks), dtype=np.int32)
        return np.repeat(groups, [width // TILE for width in self.widths])

    @cached_property
    def scale_of_lane(self) -> NDArray[np.int32]:
        """``[lanes]``: index into a row's scales ``[groups · 2]``; the empty lanes count as inliers."""
        lanes = [
            2 * group + (np.arange(width) >= outliers(rank))
            for group, (rank, width) in enumerate(zip(self.ranks, self.widths, strict=True))
        ]
        return np.concatenate(lanes).astype(np.int32)

    def join(self, latents: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Rows ``[..., lanes]`` of the groups' latents ``[..., rank]``; empty lanes are zero."""
        rows = np.zeros((*latents[0].shape[:-1], self.lanes), latents[0].dtype)
        for latent, offset, rank in zip(latents, self.offsets, self.ranks, strict=True):
            if latent.shape[-1] != rank:
                raise ValueError(f"a latent of {latent.shape[-1]} channels where the rank is {rank}")
            rows[..., offset : offset + rank] = latent
        return rows

    def split(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        """Latents ``[..., rank]`` of each group, from rows ``[..., lanes]``."""
        return [
            rows[..., offset : offset + rank] for offset, rank in zip(self.offsets, self.ranks, strict=True)
        ]


def key_code_bytes(lanes: KeyLanes, latent: LatentFormat) -> int:
    """Bytes of one row of keys without its scales."""
    return lanes.lanes * latent.lane_bits // 8


def value_code_bytes(rank: int, latent: LatentFormat) -> int:
    """Bytes of one row of values without its scales: outliers, inliers from a new byte on, padding."""
    if not latent.quantized:
        return rank * latent.lane_bits // 8
    per_byte = 8 // latent.lane_bits
    blocks = (outliers(rank), rank - outliers(rank))
    return _align(sum(-(-block // per_byte) for block in blocks), ROW_ALIGNMENT)


def key_bytes(ranks: Sequence[int], latent: LatentFormat) -> int:
    """Bytes that one token's keys take in a layer, scales and padding included."""
    scales = 2 * len(ranks) * SCALE_BYTES if latent.quantized else 0
    return key_code_bytes(KeyLanes(tuple(ranks)), latent) + scales


def value_bytes(rank: int, latent: LatentFormat) -> int:
    """Bytes that one token's values take in a layer, scales and padding included."""
    return value_code_bytes(rank, latent) + (2 * SCALE_BYTES if latent.quantized else 0)


def _align(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
