# SPDX-License-Identifier: Apache-2.0
"""One call of the operator ``QuantizedKVAttention`` as tensors.

Symbols: B sequences, H query heads, G KV heads, C rows of capacity, D head dim, R bytes of a row of codes, P
rows of the tables of cosines and sines. The meaning is that of the ONNX definition
(``starkv/onnx_quantized_kv.py``); ``starkv_kernels.h`` says it in formulas.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.tensor_checks import Wanted, check_tensors

QUANTIZED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODE_BITS = {torch.int8: 8, torch.uint8: 4}
"""Bits of a code by the caches' element type: one code of 8 bits, or two of 4 in a byte."""


@dataclass
class QuantizedAttentionCall:
    """Inputs of ``QuantizedKVAttention``, all contiguous and on one device."""

    q: Tensor
    """``[B, 1, H·D]`` float32, float16 or bfloat16, after rotation."""
    k: Tensor
    """``[B, 1, G·D]``, after rotation, with the projection's bias."""
    v: Tensor
    """``[B, 1, G·D]``, with the projection's bias."""
    past_k: Tensor
    """``[B, G, C, R]``: codes, int8 with R = D or uint8 with R = D/2. Sequence b holds ``kv_len[b]`` rows."""
    past_v: Tensor
    """Likewise."""
    kv_len: Tensor
    """``[B]`` i32."""
    positions: Tensor
    """``[B, C, 3]`` i32: (t, h, w) of every row; row ``kv_len[b]`` is the new one's."""
    k_scale: Tensor
    """``[G·D]`` f32; both columns of a rotary pair have the same."""
    v_scale: Tensor
    """``[G·D]`` f32."""
    k_bias: Tensor
    """``[G·D]`` f32, before rotation."""
    v_bias: Tensor
    """``[G·D]`` f32."""
    cos_table: Tensor
    """``[P, D/2]`` f32: cosines of position times frequency."""
    sin_table: Tensor
    """``[P, D/2]`` f32."""
    mrope_section: tuple[int, int, int]
    """Pairs of columns that rotate by t, h and w, in this order; D/2 together."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return CODE_BITS[self.past_k.dtype]

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.past_k.shape[3]) * 8 // self.bits

    @property
    def heads(self) -> int:
        """H."""
        return int(self.q.shape[2]) // self.head_dim

    def check(self) -> None:
        """Refuse tensors that don't fit each other.

        Raises:
            UsageError: names the tensor and what it should be.
        """
        if self.past_k.dim() != 4 or self.q.dim() != 3 or self.cos_table.dim() != 2:
            raise UsageError("past_k must be [B, G, C, R], q [B, 1, H*D] and cos_table [P, D/2]")
        if self.past_k.dtype not in CODE_BITS:
            raise UsageError(
                f"past_k must be int8 (codes of 8 bits) or uint8 (two of 4), not {self.past_k.dtype}"
            )
        if self.q.dtype not in QUANTIZED_DTYPES:
            raise UsageError(f"q must be float32, float16 or bfloat16, not {self.q.dtype}")
        batch, groups, capacity, row_bytes = self.past_k.shape
        dim, heads = self.head_dim, self.heads
        if heads < 1 or heads % groups:
            raise UsageError(f"{heads} query heads can't share {groups} KV heads evenly")
        if len(self.mrope_section) != 3 or sum(self.mrope_section) != dim // 2:
            raise UsageError(
                f"mrope_section must be 3 numbers that add up to {dim // 2}, not {self.mrope_section}"
            )
        numbers, codes = self.q.dtype, (self.past_k.dtype, (batch, groups, capacity, row_bytes))
        parameters = (torch.float32, (groups * dim,))
        table = (torch.float32, (self.cos_table.shape[0], dim // 2))
        wanted: dict[str, Wanted] = {
            "q": (numbers, (batch, 1, heads * dim)),
            "k": (numbers, (batch, 1, groups * dim)),
            "v": (numbers, (batch, 1, groups * dim)),
            "past_k": codes,
            "past_v": codes,
            "kv_len": (torch.int32, (batch,)),
            "positions": (torch.int32, (batch, capacity, 3)),
            **dict.fromkeys(("k_scale", "v_scale", "k_bias", "v_bias"), parameters),
            **dict.fromkeys(("cos_table", "sin_table"), table),
        }
        check_tensors(self, wanted)
