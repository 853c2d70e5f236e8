# SPDX-License-Identifier: Apache-2.0
"""One step of low-rank decode attention as tensors (STAR-KV, arXiv 2606.08382).

Symbols as in ``low_rank_factors.py``; B sequences, C rows of capacity, T rows of the tail's. Cached rows hold
latents of keys before rotation and of values, both without their biases. The tail holds the newest rows as
they are. One softmax goes over both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.cached_positions import CachedPositions
from starkv.kernels.low_rank_factors import FLOATS, LowRankFactors
from starkv.kernels.tensor_checks import Wanted, check_tensors


@dataclass
class RawTail:
    """The newest rows of every sequence, not compressed."""

    k: Tensor
    """``[B, G, T, D]`` in the type of the queries, after rotation, with bias."""
    v: Tensor
    """``[B, G, T, D]``."""
    n_valid: Tensor
    """``[B]`` i32: rows of each sequence."""
    values_have_bias: bool = False
    """Whether ``v`` is what the projection put out. Without its bias the result is the same."""


@dataclass
class LowRankCall:
    """Inputs of low-rank decode attention, all contiguous and on one device."""

    q: Tensor
    """``[B, H, D]`` float16, bfloat16 or float32, after rotation, not scaled."""
    keys: Tensor
    """``[B, C, W]`` float or int8, ``[B, C, W/2]`` uint8 for ``int4``."""
    values: Tensor
    """``[B, C, value row]`` float, int8, or uint8 for ``int4``."""
    n_valid: Tensor
    """``[B]`` i32: rows that a sequence holds."""
    where: CachedPositions
    factors: LowRankFactors
    key_scales: Tensor | None = None
    """``[B, C, F, 2]`` bfloat16: of a row's two blocks, per factor. None for floats."""
    value_scales: Tensor | None = None
    """``[B, C, 2]`` bfloat16."""
    tail: RawTail | None = None

    @property
    def sharing(self) -> int:
        """Query heads of a KV head."""
        return int(self.q.shape[1]) // self.factors.kv_heads

    def check(self) -> None:
        """Refuse tensors that don't fit each other.

        Raises:
            UsageError: names the tensor and what it should be.
        """
        if self.q.dim() != 3 or self.keys.dim() != 3:
            raise UsageError("q must be [B, H, D] and keys [B, C, lanes]")
        batch, heads, dim = self.q.shape
        capacity, factors, dtype = self.keys.shape[1], self.factors, self.q.dtype
        if dtype not in FLOATS:
            raise UsageError(f"q must be float16, bfloat16 or float32, not {dtype}")
        if heads < 1 or heads % factors.kv_heads:
            raise UsageError(f"{heads} query heads can't share {factors.kv_heads} KV heads evenly")
        if factors.up_v.dtype != dtype or factors.head_dim != dim:
            raise UsageError(
                f"factors are {factors.up_v.dtype} for head dim {factors.head_dim}, but q {dtype} for {dim}"
            )
        latent = {"float": self.keys.dtype, "int8": torch.int8, "int4": torch.uint8}[factors.form]
        if factors.form == "float" and latent not in FLOATS:
            raise UsageError(f"keys must be float16, bfloat16 or float32, not {latent}")
        wanted: dict[str, Wanted] = {
            "q": (dtype, (batch, heads, dim)),
            "keys": (latent, (batch, capacity, factors.key_row)),
            "values": (latent, (batch, capacity, factors.value_row)),
            "n_valid": (torch.int32, (batch,)),
        }
        if factors.form == "float":
            if self.key_scales is not None or self.value_scales is not None:
                raise UsageError(
                    "latents that are floats have no scales: leave key_scales and value_scales out"
                )
        elif self.key_scales is None or self.value_scales is None:
            raise UsageError(f"latents in {factors.form} need key_scales and value_scales")
        else:
            wanted["key_scales"] = (torch.bfloat16, (batch, capacity, len(factors.key_ranks), 2))
            wanted["value_scales"] = (torch.bfloat16, (batch, capacity, 2))
        check_tensors(self, wanted)
        self.where.check(batch, capacity, dim)
        elsewhere = {"positions": self.where.positions, "factors": factors.up_v}
        if self.tail is not None:
            rows = self.tail.k.shape[2] if self.tail.k.dim() == 4 else 0
            tail = (dtype, (batch, factors.kv_heads, rows, dim))
            check_tensors(self.tail, {"k": tail, "v": tail, "n_valid": (torch.int32, (batch,))})
            elsewhere["the tail"] = self.tail.k
        for name, tensor in elsewhere.items():
            if tensor.device != self.q.device:
                raise UsageError(f"{name} is on {tensor.device}, but q on {self.q.device}")


@dataclass(frozen=True)
class DecodeResult:
    """Attention of one new token, and what is needed to merge it with attention over other rows."""

    out: Tensor
    """``[B, H, D]`` in the type of the queries. 0 where a sequence holds no row, or a number of rows that its
    cache can't hold."""
    largest: Tensor
    """``[B, H]`` f32: the largest logit; −inf where there is none."""
    total: Tensor
    """``[B, H]`` f32: sum over the rows of exp(logit − largest)."""
