# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Logits that a query gets from the bias of keys, per component of a position.

A rotated bias depends on its row by three numbers only, and every rotary pair turns by one of them. So q ·
R(t, h, w) b is a sum of three functions, of t, of h and of w. They are tabled once per step; rows then look
up three numbers in place of a rotation. Tables are as long as positions are large, not as the cache has rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from starkv.kernels.cached_positions import CachedPositions
from starkv.kernels.triton_shared import blocks, padded

_POSITIONS = 32


@triton.jit
def bias_logits_kernel(
    q_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    tables_ptr,
    table_rows,
    SHARING: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Tables of one KV head's queries for some positions, ``[B, 3, P, H]``."""
    block, group, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query_heads = tl.num_programs(1) * SHARING
    position = block * POSITIONS + tl.arange(0, POSITIONS)
    pair = tl.arange(0, PAIRS)
    real = pair < HALF
    at = position.to(tl.int64)[:, None] * HALF + pair[None, :]
    inside = (position < table_rows)[:, None] & real[None, :]
    cosines = tl.load(cos_ptr + at, mask=inside, other=0.0)
    sines = tl.load(sin_ptr + at, mask=inside, other=0.0)
    first = tl.load(bias_ptr + group * (2 * HALF) + pair, mask=real, other=0.0)
    second = tl.load(bias_ptr + group * (2 * HALF) + HALF + pair, mask=real, other=0.0)
    for sharer in range(SHARING):
        head = group * SHARING + sharer
        q_at = (sequence * query_heads + head) * (2 * HALF) + pair
        q_first = tl.load(q_ptr + q_at, mask=real, other=0.0).to(tl.float32)
        q_second = tl.load(q_ptr + q_at + HALF, mask=real, other=0.0).to(tl.float32)
        with_cosine = q_first * first + q_second * second
        with_sine = q_second * first - q_first * second
        logit = cosines * with_cosine[None, :] + sines * with_sine[None, :]
        for component in tl.static_range(3):
            start = 0 if component == 0 else SECTION_T if component == 1 else SECTION_T + SECTION_H
            end = SECTION_T if component == 0 else SECTION_T + SECTION_H if component == 1 else HALF
            turned = (pair >= start) & (pair < end)
            table_at = (sequence.to(tl.int64) * 3 + component) * table_rows + position
            tl.store(
                tables_ptr + table_at * query_heads + head,
                tl.sum(tl.where(turned[None, :], logit, 0.0), 1),
                mask=position < table_rows,
            )


def bias_logits(q: Tensor, key_bias: Tensor, where: CachedPositions) -> Tensor:
    """Unscaled logits of the bias, ``[B, 3, P, H]`` f32.

    Args:
        q: ``[B, H, D]``, after rotation.
        key_bias: ``[G, D]`` f32.
        where: its angles are read, for all positions that they know.
    """
    batch, heads, dim = q.shape
    groups, table_rows = len(key_bias), len(where.cosines)
    tables = torch.empty(batch, 3, table_rows, heads, dtype=torch.float32, device=q.device)
    bias_logits_kernel[(blocks(table_rows, _POSITIONS), groups, batch)](
        q,
        key_bias,
        where.cosines,
        where.sines,
        tables,
        table_rows,
        SHARING=heads // groups,
        HALF=dim // 2,
        PAIRS=padded(dim // 2, 16),
        SECTION_T=where.sections[0],
        SECTION_H=where.sections[1],
        POSITIONS=_POSITIONS,
    )
    return tables
