# SPDX-License-Identifier: Apache-2.0
"""Random calls of ``PackableKVAttention``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.kernels.packable_attention_call import PackableAttentionCall
from starkv.validation.quantized_calls import QuantizedSize, make_quantized_call


@dataclass(frozen=True)
class PackableSize:
    """Dimensions of a call."""

    codes: QuantizedSize
    """Of the codes; a capacity of 1 is for calls over floats, whose rows ``held`` then counts."""
    float_rows: int
    """Capacity of the floats."""
    new_tokens: int = 1

    @property
    def name(self) -> str:
        """Such as "17 tokens over floats" or "1 token over codes of 8 bits"."""
        tokens = f"{self.new_tokens} token{'s' * (self.new_tokens > 1)}"
        return f"{tokens} over {f'codes of {self.codes.bits} bits' if self.codes.capacity > 1 else 'floats'}"


def make_packable_call(
    size: PackableSize, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PackableAttentionCall:
    """A random call. Both caches hold something everywhere.

    Args:
        size: dimensions.
        dtype: of the queries and floats.
    """
    codes = make_quantized_call(size.codes, dtype, device, seed)
    random = torch.Generator(device).manual_seed(seed + size.float_rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    batch, groups, dim = len(size.codes.held), size.codes.kv_heads, size.codes.head_dim
    q, k, v = (
        (tokens + draw(batch, size.new_tokens, tokens.shape[-1])).to(dtype)
        for tokens in (codes.q, codes.k, codes.v)
    )
    return PackableAttentionCall(
        q=q,
        k=k,
        v=v,
        past_k=draw(batch, groups, size.float_rows, dim).to(dtype),
        past_v=draw(batch, groups, size.float_rows, dim).to(dtype),
        kv_len=codes.kv_len,
        past_k_codes=codes.past_k,
        past_v_codes=codes.past_v,
        positions=codes.positions,
        k_scale=codes.k_scale,
        v_scale=codes.v_scale,
        k_bias=codes.k_bias,
        v_bias=codes.v_bias,
        cos_table=codes.cos_table,
        sin_table=codes.sin_table,
        mrope_section=codes.mrope_section,
    )
