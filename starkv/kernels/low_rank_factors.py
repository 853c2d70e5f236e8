# SPDX-License-Identifier: Apache-2.0
"""The constants of low-rank decode attention, laid out for kernels (STAR-KV, arXiv 2606.08382).

Symbols: H query heads, G KV heads, D head dim, F key factors, N = G / F KV heads of each, W lanes of a key row.

A *lane* is a place of a latent channel in a cached row. Key factors have ranks of their own; each begins at a
multiple of 16 lanes. Quantized rows have two blocks per factor, each with a scale of its own: the first channels,
which are the strongest, and all others. In ``int4`` a byte holds two lanes, the even one in its low half. Value
rows hold the bytes of the first block, those of the second, and zeros up to a multiple of 8 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from starkv.errors import UsageError

LatentForm = Literal["float", "int8", "int4"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LANE_TILE = 16
OUTLIER_SHARE = 0.2
"""Share of a factor's channels in the first block."""
CODE_OFFSET = 8
"""What 4-bit codes are stored with, so that they are not negative."""


def padded_to(size: int, tile: int) -> int:
    """The next multiple of ``tile``."""
    return -(-size // tile) * tile


@dataclass(frozen=True)
class LowRankFactors:
    """Factors and biases of one layer. Made by :meth:`of`."""

    form: LatentForm
    """Of the cached latents."""
    key_ranks: tuple[int, ...]
    """Of the F key factors."""
    value_rank: int
    up_k: Tensor
    """``[N, W, D]``: lanes to the n-th key head of their factor; zeros in lanes that hold nothing."""
    up_v: Tensor
    """``[G, value lanes, D]``; zeros in lanes that hold nothing."""
    key_bias: Tensor
    """``[G, D]`` f32."""
    value_bias: Tensor
    """``[G, D]`` f32."""
    lanes: Tensor
    """``[F, 3]`` i32: a key factor's first lane, the one behind its last, and channels of its first block."""
    value_outliers: int
    """Channels of the values' first block."""

    @classmethod
    def of(
        cls,
        form: LatentForm,
        key_factors: Sequence[Tensor],
        value_factor: Tensor,
        key_bias: Tensor,
        value_bias: Tensor,
        outlier_share: float = OUTLIER_SHARE,
    ) -> "LowRankFactors":
        """Lay out the factors of a layer.

        Args:
            form: how the cache holds latents.
            key_factors: ``up`` of each group of KV heads, ``[N · D, rank]`` in the type of the queries.
            value_factor: ``up`` of all heads' values, ``[G · D, rank]``.
            key_bias: ``[G, D]``; zeros for a model without.
            value_bias: ``[G, D]``.
            outlier_share: of a factor's channels in its first block.

        Raises:
            UsageError: the factors don't fit each other.
        """
        groups, dim = key_bias.shape
        _check_factors(form, key_factors, value_factor, key_bias, value_bias)
        heads = groups // len(key_factors)
        ranks = tuple(int(up.shape[1]) for up in key_factors)
        device, dtype = value_factor.device, value_factor.dtype
        table, first = [], 0
        up_k = torch.zeros(heads, sum(padded_to(rank, LANE_TILE) for rank in ranks), dim).to(device, dtype)
        for up, rank in zip(key_factors, ranks, strict=True):
            up_k[:, first : first + rank] = up.unflatten(0, (heads, dim)).transpose(1, 2)
            end = first + padded_to(rank, LANE_TILE)
            table.append((first, end, int(outlier_share * rank)))
            first = end
        rank = int(value_factor.shape[1])
        outliers = int(outlier_share * rank)
        lane_of_channel = value_lanes(form, rank, outliers)
        up_v = torch.zeros(groups, value_row(form, rank, outliers)[1], dim, device=device, dtype=dtype)
        up_v[:, lane_of_channel] = value_factor.unflatten(0, (groups, dim)).transpose(1, 2)
        return cls(
            form=form,
            key_ranks=ranks,
            value_rank=rank,
            up_k=up_k,
            up_v=up_v,
            key_bias=key_bias.float().contiguous(),
            value_bias=value_bias.float().contiguous(),
            lanes=torch.tensor(table, dtype=torch.int32, device=device),
            value_outliers=outliers,
        )

    @property
    def kv_heads(self) -> int:
        """G."""
        return int(self.up_v.shape[0])

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.up_v.shape[2])

    @property
    def key_lanes(self) -> int:
        """W."""
        return int(self.up_k.shape[1])

    @property
    def key_row(self) -> int:
        """Elements of a key row: lanes, or bytes of two."""
        return self.key_lanes // 2 if self.form == "int4" else self.key_lanes

    @property
    def value_row(self) -> int:
        """Elements of a value row: lanes, or bytes of two."""
        return value_row(self.form, self.value_rank, self.value_outliers)[0]

    @property
    def bytes_per_row(self) -> int:
        """What a cached row takes, scales included, positions not."""
        width = self.up_v.element_size() if self.form == "float" else 1
        scales = 0 if self.form == "float" else 2 * 2 * (len(self.key_ranks) + 1)
        return (self.key_row + self.value_row) * width + scales


def value_row(form: LatentForm, rank: int, outliers: int) -> tuple[int, int]:
    """Elements and lanes of a value row."""
    if form != "int4":
        return rank, rank
    row_bytes = padded_to((outliers + 1) // 2 + (rank - outliers + 1) // 2, 8)
    return row_bytes, 2 * row_bytes


def value_lanes(form: LatentForm, rank: int, outliers: int) -> Tensor:
    """``[rank]``: the lane of each value channel. Bytes hold channels of one block only, so an odd number of
    outliers leaves a lane empty."""
    channel = torch.arange(rank)
    if form != "int4":
        return channel
    return torch.where(channel < outliers, channel, channel + outliers % 2)


def _check_factors(
    form: LatentForm, key_factors: Sequence[Tensor], value_factor: Tensor, key_bias: Tensor, value_bias: Tensor
) -> None:
    if form not in ("float", "int8", "int4"):
        raise UsageError(f"latents are cached as float, int8 or int4, not as {form!r}")
    groups, dim = key_bias.shape
    if value_bias.shape != key_bias.shape:
        raise UsageError(f"value_bias must be {list(key_bias.shape)} as key_bias, not {list(value_bias.shape)}")
    if not key_factors or groups % len(key_factors):
        raise UsageError(f"{len(key_factors)} key factors can't share {groups} KV heads evenly")
    if value_factor.dtype not in FLOATS:
        raise UsageError(f"factors must be float16, bfloat16 or float32, not {value_factor.dtype}")
    named = [("value_factor", value_factor, groups * dim)]
    named += [
        (f"key_factors[{at}]", up, groups // len(key_factors) * dim) for at, up in enumerate(key_factors)
    ]
    for name, up, width in named:
        if up.dim() != 2 or up.shape[0] != width or not 1 <= up.shape[1] <= width:
            raise UsageError(f"{name} must be [{width}, rank of 1 to {width}], not {list(up.shape)}")
        if up.dtype != value_factor.dtype or up.device != value_factor.device:
            raise UsageError(
                f"{name} is {up.dtype} on {up.device}, but value_factor {value_factor.dtype} on {value_factor.device}"
            )
