# SPDX-License-Identifier: Apache-2.0
"""Random calls of ``QuantizedKVAttention``, with positions as screenshots and text have them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.kernels.quantized_attention_call import QuantizedAttentionCall
from starkv.kernels.quantized_attention_reference import encode, rotated_bias

THETA = 1e6
"""Base of the rotary frequencies."""
_IMAGE_COLUMNS = 20
_LOUD = 30.0
"""How much larger than the rest a few numbers of the keys' bias are, as in Qwen2."""


@dataclass(frozen=True)
class QuantizedSize:
    """Dimensions of a call."""

    held: tuple[int, ...]
    """Rows of each sequence before the new one."""
    capacity: int
    bits: int = 8
    query_heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    table_rows: int = 600


def make_quantized_call(
    size: QuantizedSize, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> QuantizedAttentionCall:
    """A random call. Rows alternate between images of 20 columns and stretches of text; the new row's
    position is one more than any before it. Behind it positions are senseless: nobody may read them.

    Args:
        size: dimensions; keys and values have a deviation of about 1 beside their biases.
    """
    random = torch.Generator(device).manual_seed(seed + size.capacity + size.head_dim + size.bits)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    batch, groups, dim = len(size.held), size.kv_heads, size.head_dim
    # Four deviations fit, and the lowest code, which is one step farther, occurs too.
    peak = 4 / (2 ** (size.bits - 1) - 1)
    pair_scale = peak * (1 + draw(groups, dim // 2).abs())
    k_scale, v_scale = pair_scale.repeat(1, 2), peak * (1 + draw(groups, dim).abs())
    k_bias, v_bias = draw(groups, dim), draw(groups, dim)
    k_bias[:, :: dim // 4] *= _LOUD
    rows = (batch, groups, size.capacity, dim)
    caches = [encode(2 * draw(*rows), scale[:, None], size.bits) for scale in (k_scale, v_scale)]
    angles = torch.arange(size.table_rows, device=device)[:, None] * THETA ** (
        -torch.arange(dim // 2, device=device, dtype=torch.float64) / (dim // 2)
    )
    pairs = dim // 2
    sections = (pairs // 4, pairs * 3 // 8, pairs - pairs // 4 - pairs * 3 // 8)
    call = QuantizedAttentionCall(
        q=(2 * draw(batch, 1, size.query_heads * dim)).to(dtype),
        k=draw(batch, 1, groups * dim),
        v=(draw(batch, 1, groups * dim) + v_bias.view(-1)).to(dtype),
        past_k=caches[0],
        past_v=caches[1],
        kv_len=torch.tensor(size.held, dtype=torch.int32, device=device),
        positions=_positions(size).to(device),
        k_scale=k_scale.flatten(),
        v_scale=v_scale.flatten(),
        k_bias=k_bias.flatten(),
        v_bias=v_bias.flatten(),
        cos_table=angles.cos().float(),
        sin_table=angles.sin().float(),
        mrope_section=sections,
    )
    newest = call.kv_len.clamp(0, size.capacity - 1).long()
    of_newest = call.positions[torch.arange(batch, device=device), newest].clamp(min=0)
    call.k = (call.k + rotated_bias(call, of_newest).view(batch, 1, -1)).to(dtype)
    return call


def _positions(size: QuantizedSize) -> Tensor:
    """``[B, C, 3]`` i32. An image of 10 rows has one t, its text 10 positions."""
    row = torch.arange(size.capacity)
    in_turn, turn = row % (12 * _IMAGE_COLUMNS), row // (12 * _IMAGE_COLUMNS)
    is_image, base = in_turn < 10 * _IMAGE_COLUMNS, turn * 3 * _IMAGE_COLUMNS
    text = base + _IMAGE_COLUMNS + in_turn - 10 * _IMAGE_COLUMNS
    t = torch.where(is_image, base, text)
    h = torch.where(is_image, base + in_turn // _IMAGE_COLUMNS, text)
    w = torch.where(is_image, base + in_turn % _IMAGE_COLUMNS, text)
    # Evicted streams use the same positions over and over as well.
    of_all = torch.stack((t, h, w), -1) % (size.table_rows - 1)
    positions = of_all.repeat(len(size.held), 1, 1)
    for sequence, held in enumerate(size.held):
        if 0 <= held < size.capacity:
            before = positions[sequence, :held]
            positions[sequence, held] = int(before.max()) + 1 if held else 0
            positions[sequence, held + 1 :] = -(1 << 30)
    return positions.to(torch.int32)
