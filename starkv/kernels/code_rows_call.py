# SPDX-License-Identifier: Apache-2.0
"""Rows of a float cache that become codes in a slot of a quantized cache, or the reverse, as tensors.

Symbols: L layers, G KV heads, C rows of the float cache, D head dim, S slots of the cache of codes, E rows of
a slot, R bytes of a row of codes, P rows of the tables of cosines and sines. ``starkv_kernels.h`` says what a
code is; the meaning is that of ``QuantizedKVAttention``, which appends one row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.quantized_attention_call import CODE_BITS, QUANTIZED_DTYPES
from starkv.kernels.tensor_checks import Wanted, check_tensors


@dataclass
class CodeRowsCall:
    """What quantizing reads and writes, and dequantizing the other way round; all contiguous, one device."""

    k: Tensor
    """``[L, 1, G, C, D]`` float32, float16 or bfloat16: rotated, with the projection's bias."""
    v: Tensor
    """``[L, 1, G, C, D]``, with the projection's bias."""
    lengths: Tensor
    """``[L]`` i32: rows of each layer."""
    positions: Tensor
    """``[L, S, E, 3]`` i32: (t, h, w) of the rows of codes."""
    k_scale: Tensor
    """``[L, G·D]`` f32."""
    v_scale: Tensor
    """``[L, G·D]`` f32."""
    k_bias: Tensor
    """``[L, G·D]`` f32, before rotation."""
    v_bias: Tensor
    """``[L, G·D]`` f32."""
    cos_table: Tensor
    """``[P, D/2]`` f32: cosines of position times frequency."""
    sin_table: Tensor
    """``[P, D/2]`` f32."""
    k_codes: Tensor
    """``[L, S, G, E, R]``: int8 with R = D, or uint8 with R = D/2."""
    v_codes: Tensor
    """Likewise."""
    slot: int
    """Of the cache of codes."""
    mrope_section: tuple[int, int, int]
    """Pairs of columns that rotate by t, h and w, in this order; D/2 together."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return CODE_BITS[self.k_codes.dtype]

    def check(self) -> None:
        """Refuse tensors that don't fit each other.

        Raises:
            UsageError: names the tensor and what it should be.
        """
        if self.k.dim() != 5 or self.k_codes.dim() != 5 or self.cos_table.dim() != 2:
            raise UsageError(
                "k must be [L, 1, G, C, D], k_codes [L, S, G, E, R] and cos_table [P, D/2], not "
                f"{list(self.k.shape)}, {list(self.k_codes.shape)} and {list(self.cos_table.shape)}"
            )
        if self.k.dtype not in QUANTIZED_DTYPES:
            raise UsageError(f"k must be float32, float16 or bfloat16, not {self.k.dtype}")
        if self.k_codes.dtype not in CODE_BITS:
            raise UsageError(
                f"k_codes must be int8 (codes of 8 bits) or uint8 (two of 4), not {self.k_codes.dtype}"
            )
        layers, _, groups, capacity, dim = self.k.shape
        if len(self.mrope_section) != 3 or sum(self.mrope_section) != dim // 2:
            raise UsageError(
                f"mrope_section must be 3 numbers that add up to {dim // 2}, not {self.mrope_section}"
            )
        slots, rows = self.k_codes.shape[1], self.k_codes.shape[3]
        floats = (self.k.dtype, (layers, 1, groups, capacity, dim))
        codes = (self.k_codes.dtype, (layers, slots, groups, rows, dim * self.bits // 8))
        table = (torch.float32, (self.cos_table.shape[0], dim // 2))
        wanted: dict[str, Wanted] = {
            **dict.fromkeys(("k", "v"), floats),
            "lengths": (torch.int32, (layers,)),
            "positions": (torch.int32, (layers, slots, rows, 3)),
            **dict.fromkeys(
                ("k_scale", "v_scale", "k_bias", "v_bias"), (torch.float32, (layers, groups * dim))
            ),
            **dict.fromkeys(("cos_table", "sin_table"), table),
            **dict.fromkeys(("k_codes", "v_codes"), codes),
        }
        check_tensors(self, wanted)
