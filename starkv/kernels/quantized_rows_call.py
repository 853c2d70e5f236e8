# SPDX-License-Identifier: Apache-2.0
"""One step of decode attention over a quantized cache of full rank as tensors, and its reference in PyTorch.

Symbols: B sequences, H query heads, G KV heads, C rows of capacity, D head dim. Keys are cached as codes of
k − R(position) b with b the bias of the key projection and R its rotation, values as codes of v − their bias;
every channel of a KV head has a scale of its own. ``int8``: clip(rint(x / scale), −128, 127). ``int4``:
clip(rint(x / scale), −8, 7) + 8, two to a byte, the even channel in the low half. See docs/kv-compression.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.cached_positions import CachedPositions, rotate
from starkv.kernels.low_rank_call import DecodeResult
from starkv.kernels.low_rank_factors import FLOATS, LatentForm
from starkv.kernels.low_rank_reference import attend, lanes_of
from starkv.kernels.tensor_checks import Wanted, check_tensors


@dataclass
class KeyBias:
    """What was taken out of the keys before they were quantized."""

    bias: Tensor
    """``[G, D]`` f32, before rotation."""
    where: CachedPositions
    """What it was rotated by."""


@dataclass
class QuantizedRowsCall:
    """Inputs of decode attention over codes, all contiguous and on one device."""

    q: Tensor
    """``[B, H, D]`` float16, bfloat16 or float32, after rotation, not scaled."""
    k: Tensor
    """``[B, G, C, D]`` int8, or ``[B, G, C, D/2]`` uint8 for ``int4``."""
    v: Tensor
    """As ``k``."""
    k_scales: Tensor
    """``[G, D]`` f32."""
    v_scales: Tensor
    """``[G, D]`` f32."""
    n_valid: Tensor
    """``[B]`` i32: rows that a sequence holds."""
    key_bias: KeyBias | None = None
    value_bias: Tensor | None = None
    """``[G, D]`` f32."""

    @property
    def sharing(self) -> int:
        """Query heads of a KV head."""
        return int(self.q.shape[1]) // int(self.k.shape[1])

    def check(self) -> None:
        """Refuse tensors that don't fit each other.

        Raises:
            UsageError: names the tensor and what it should be.
        """
        if self.q.dim() != 3 or self.k.dim() != 4:
            raise UsageError("q must be [B, H, D] and k [B, G, C, D] or [B, G, C, D/2]")
        batch, heads, dim = self.q.shape
        groups, capacity = self.k.shape[1:3]
        if self.q.dtype not in FLOATS:
            raise UsageError(f"q must be float16, bfloat16 or float32, not {self.q.dtype}")
        if self.k.dtype not in (torch.int8, torch.uint8):
            raise UsageError(f"k must be int8, or uint8 with two codes to a byte, not {self.k.dtype}")
        if heads < 1 or groups < 1 or heads % groups:
            raise UsageError(f"{heads} query heads can't share {groups} KV heads evenly")
        codes = (self.k.dtype, (batch, groups, capacity, dim if self.k.dtype == torch.int8 else dim // 2))
        channels = (torch.float32, (groups, dim))
        wanted: dict[str, Wanted] = {
            "q": (self.q.dtype, (batch, heads, dim)),
            "k": codes,
            "v": codes,
            "k_scales": channels,
            "v_scales": channels,
            "n_valid": (torch.int32, (batch,)),
        }
        if self.value_bias is not None:
            wanted["value_bias"] = channels
        check_tensors(self, wanted)
        if self.key_bias is not None:
            check_tensors(self.key_bias, {"bias": channels})
            self.key_bias.where.check(batch, capacity, dim)
            if self.key_bias.bias.device != self.q.device or (
                self.key_bias.where.positions.device != self.q.device
            ):
                raise UsageError(f"key_bias must be on {self.q.device} as q is")


def quantize_rows(rows: Tensor, scales: Tensor, form: LatentForm) -> Tensor:
    """Codes of ``rows [..., G, C, D]`` with scales ``[G, D]``: int8, or uint8 with two to a byte for
    ``int4``."""
    steps = torch.round(rows.float() / scales[:, None])
    if form == "int8":
        return steps.clamp(-128, 127).to(torch.int8)
    codes = (steps.clamp(-8, 7) + 8).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def reference_quantized_rows(call: QuantizedRowsCall) -> DecodeResult:
    """The same as :func:`starkv.kernels.triton_quantized_rows.quantized_rows_attention`, in float32."""
    batch, heads, dim = call.q.shape
    capacity = call.k.shape[2]
    form: LatentForm = "int8" if call.k.dtype == torch.int8 else "int4"
    result = DecodeResult(
        out=torch.zeros(batch, heads, dim, device=call.q.device),
        largest=torch.full((batch, heads), -torch.inf, device=call.q.device),
        total=torch.zeros(batch, heads, device=call.q.device),
    )
    for sequence, rows in enumerate(call.n_valid.tolist()):
        if not 0 < rows <= capacity:
            continue
        keys = lanes_of(call.k[sequence, :, :rows], form) * call.k_scales[:, None]
        values = lanes_of(call.v[sequence, :, :rows], form) * call.v_scales[:, None]
        if call.key_bias is not None:
            cosines, sines = (angles[:rows] for angles in call.key_bias.where.angles(sequence))
            keys = keys + rotate(call.key_bias.bias[:, None], cosines, sines)
        if call.value_bias is not None:
            values = values + call.value_bias[:, None]
        attend(call.q[sequence], keys, values, sequence, result)
    return result
