# SPDX-License-Identifier: Apache-2.0
"""The constants of low-rank decode attention, laid out for kernels (STAR-KV, arXiv 2606.08382).

Symbols: H query heads, G KV heads, D head dim, F key factors, N = G / F KV heads of each, W lanes of a key
row.

Rows are laid out as ``starkv/lowrank/latent_format.py`` says: a *lane* is a place of a latent channel in a
row. In ``int4`` a byte holds two lanes, the even one in its low half; whether 3 or 4 bits of a code are used
makes no difference here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.lowrank.latent_format import INT8, NIBBLES, KeyLanes, outliers, value_code_bytes

LatentForm = Literal["float", "int8", "int4"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CODE_OFFSET = 8
"""What codes of 4 bits are stored with, so that they are not negative."""
_CODES = {"int8": INT8, "int4": NIBBLES}


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

    @classmethod
    def of(
        cls,
        form: LatentForm,
        key_factors: Sequence[Tensor],
        value_factor: Tensor,
        key_bias: Tensor,
        value_bias: Tensor,
    ) -> "LowRankFactors":
        """Lay out the factors of a layer.

        Args:
            form: how the cache holds latents.
            key_factors: ``up`` of each group of KV heads, ``[N · D, rank]`` in the type of the queries.
            value_factor: ``up`` of all heads' values, ``[G · D, rank]``.
            key_bias: ``[G, D]``; zeros for a model without.
            value_bias: ``[G, D]``.

        Raises:
            UsageError: the factors don't fit each other.
        """
        groups, dim = key_bias.shape
        _check_factors(form, key_factors, value_factor, key_bias, value_bias)
        heads = groups // len(key_factors)
        key_lanes = KeyLanes(tuple(int(up.shape[1]) for up in key_factors))
        device, dtype = value_factor.device, value_factor.dtype
        table = []
        up_k = torch.zeros(heads, key_lanes.lanes, dim, device=device, dtype=dtype)
        parts = zip(key_factors, key_lanes.offsets, key_lanes.widths, key_lanes.ranks, strict=True)
        for up, first, width, rank in parts:
            up_k[:, first : first + rank] = up.unflatten(0, (heads, dim)).transpose(1, 2)
            table.append((first, first + width, outliers(rank)))
        rank = int(value_factor.shape[1])
        up_v = torch.zeros(groups, value_row(form, rank)[1], dim, device=device, dtype=dtype)
        up_v[:, value_lanes(form, rank)] = value_factor.unflatten(0, (groups, dim)).transpose(1, 2)
        return cls(
            form=form,
            key_ranks=key_lanes.ranks,
            value_rank=rank,
            up_k=up_k,
            up_v=up_v,
            key_bias=key_bias.float().contiguous(),
            value_bias=value_bias.float().contiguous(),
            lanes=torch.tensor(table, dtype=torch.int32, device=device),
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
        return value_row(self.form, self.value_rank)[0]

    @property
    def value_outliers(self) -> int:
        """Channels of the values' first block."""
        return outliers(self.value_rank)

    @property
    def bytes_per_row(self) -> int:
        """What a cached row takes, scales included, positions not."""
        width = self.up_v.element_size() if self.form == "float" else 1
        scales = 0 if self.form == "float" else 2 * 2 * (len(self.key_ranks) + 1)
        return (self.key_row + self.value_row) * width + scales


def value_row(form: LatentForm, rank: int) -> tuple[int, int]:
    """Elements and lanes of a value row."""
    if form == "float":
        return rank, rank
    row_bytes = value_code_bytes(rank, _CODES[form])
    return row_bytes, row_bytes * 8 // _CODES[form].lane_bits


def value_lanes(form: LatentForm, rank: int) -> Tensor:
    """``[rank]``: the lane of each value channel. Bytes hold channels of one block only, so an odd number of
    outliers leaves a lane empty."""
    channel = torch.arange(rank)
    if form != "int4":
        return channel
    return torch.where(channel < outliers(rank), channel, channel + outliers(rank) % 2)


def _check_factors(
    form: LatentForm,
    key_factors: Sequence[Tensor],
    value_factor: Tensor,
    key_bias: Tensor,
    value_bias: Tensor,
) -> None:
    if form not in ("float", "int8", "int4"):
        raise UsageError(f"latents are cached as float, int8 or int4, not as {form!r}")
    groups, dim = key_bias.shape
    if value_bias.shape != key_bias.shape:
        raise UsageError(
            f"value_bias must be {list(key_bias.shape)} as key_bias, not {list(value_bias.shape)}"
        )
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
                f"{name} is {up.dtype} on {up.device}, but value_factor "
                f"{value_factor.dtype} on {value_factor.device}"
            )
