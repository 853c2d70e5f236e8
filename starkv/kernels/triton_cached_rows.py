# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention of one new token over rows of full rank: floats, or int8 and int4 codes with a scale per channel.

Scales of keys go into the queries and those of values into the sums, so codes meet tensor cores as they are.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from starkv.kernels.triton_decode import (
    FLOAT,
    FORMS,
    INT4,
    Parts,
    held_rows,
    split_count,
    tensor_product,
    widen_max,
)
from starkv.kernels.triton_latents import OFFSET
from starkv.kernels.triton_shared import blocks, padded

_ROWS = 64


@triton.jit
def loaded_query(
    q_ptr,
    scales_ptr,
    head,
    query,
    channel,
    query_heads,
    sequence,
    DIM: tl.constexpr,
    SHARING: tl.constexpr,
    FORM: tl.constexpr,
):
    """``[channels, queries]`` of the query heads that share a KV head, times the scales of its keys."""
    real = (channel < DIM)[:, None] & (query < SHARING)[None, :]
    q_at = (sequence * query_heads + head * SHARING + query)[None, :] * DIM + channel[:, None]
    q = tl.load(q_ptr + q_at, mask=real, other=0.0)
    if FORM != FLOAT:
        scale = tl.load(scales_ptr + head * DIM + channel, mask=channel < DIM, other=0.0)
        q = (q.to(tl.float32) * scale[:, None]).to(q.dtype)
    return q


@triton.jit
def nibble(codes, ODD: tl.constexpr):
    """Numbers around 0 in the low or high halves of bytes, as floats."""
    return (((codes >> (4 * ODD)) & 15).to(tl.int32) - OFFSET).to(tl.float32)


@triton.jit
def cached_rows_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    positions_ptr,
    bias_logits_ptr,
    n_valid_ptr,
    parts_ptr,
    part_max_ptr,
    part_sum_ptr,
    scale,
    capacity,
    table_rows,
    DIM: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PADDED: tl.constexpr,
    SHARING: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Largest logit, sum and Σ exp(logit − largest) · value of a part of a KV head's rows.

    ``ELEMENTS``: of a row, numbers or bytes of two; ``PADDED`` of a block. ``bias_logits`` are those of the
    keys' bias, per component of a position: ``[B, 3, table_rows, H]``.
    """
    split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    query_heads = kv_heads * SHARING
    length = held_rows(n_valid_ptr, sequence, capacity)
    used = tl.cdiv(length, ROWS)
    per_split = tl.cdiv(used, tl.num_programs(0))
    query, element = tl.arange(0, QUERIES), tl.arange(0, PADDED)
    # A byte of int4 holds an even and an odd channel: two products, whose codes needn't be woven together.
    channel = 2 * element if FORM == INT4 else element
    q = loaded_query(q_ptr, k_scales_ptr, head, query, channel, query_heads, sequence, DIM, SHARING, FORM)
    if FORM == INT4:
        odd_q = loaded_query(
            q_ptr, k_scales_ptr, head, query, channel + 1, query_heads, sequence, DIM, SHARING, FORM
        )
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([PADDED, QUERIES], tl.float32)
    odd_sums = tl.zeros([PADDED, QUERIES], tl.float32)
    head_at = (sequence.to(tl.int64) * kv_heads + head) * capacity
    tables_ptr = bias_logits_ptr + sequence.to(tl.int64) * 3 * table_rows * query_heads
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, used)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < length
        row_at = (head_at + row)[:, None] * ELEMENTS + element[None, :]
        stored = inside[:, None] & (element < ELEMENTS)[None, :]
        keys = tl.load(k_ptr + row_at, mask=stored, other=0)
        values = tl.load(v_ptr + row_at, mask=stored, other=0)
        if FORM == INT4:
            logits = tensor_product(nibble(keys, 0).to(q.dtype), q, WIDEN)
            logits += tensor_product(nibble(keys, 1).to(q.dtype), odd_q, WIDEN)
        else:
            logits = tensor_product(keys.to(tl.float32).to(q.dtype), q, WIDEN)
        if HAS_BIAS:
            at = sequence.to(tl.int64) * capacity + row
            for component in tl.static_range(3):
                position = tl.load(positions_ptr + 3 * at + component, mask=inside, other=0)
                known = (position >= 0) & (position < table_rows)
                table_at = (component * table_rows + position)[:, None] * query_heads + (
                    head * SHARING + query
                )[None, :]
                logits += tl.load(
                    tables_ptr + table_at,
                    mask=known[:, None] & (query < SHARING)[None, :],
                    other=float("nan"),
                )
        logits = tl.where(inside[:, None], logits * scale, float("-inf"))
        larger, shift = widen_max(largest, tl.max(logits, 0))
        rescale = tl.exp(largest - shift)
        mass = tl.exp(logits - shift[None, :])
        largest = larger
        total = total * rescale + tl.sum(mass, 0)
        mass = mass.to(q.dtype)
        if FORM == INT4:
            even = tl.trans(nibble(values, 0).to(q.dtype))
            odd = tl.trans(nibble(values, 1).to(q.dtype))
            sums = sums * rescale[None, :] + tensor_product(even, mass, WIDEN)
            odd_sums = odd_sums * rescale[None, :] + tensor_product(odd, mass, WIDEN)
        else:
            transposed = tl.trans(values.to(tl.float32).to(q.dtype))
            sums = sums * rescale[None, :] + tensor_product(transposed, mass, WIDEN)
    part = (split * tl.num_programs(2) + sequence).to(tl.int64) * query_heads + head * SHARING + query
    tl.store(part_max_ptr + part, largest, mask=query < SHARING)
    tl.store(part_sum_ptr + part, total, mask=query < SHARING)
    if split * per_split < used:
        part_at = part[None, :] * DIM + channel[:, None]
        written = (element < ELEMENTS)[:, None] & (query < SHARING)[None, :]
        if FORM != FLOAT:
            scales_at = v_scales_ptr + head * DIM + channel
            sums *= tl.load(scales_at, mask=element < ELEMENTS, other=0.0)[:, None]
        tl.store(parts_ptr + part_at, sums, mask=written)
        if FORM == INT4:
            odd_sums *= tl.load(scales_at + 1, mask=element < ELEMENTS, other=0.0)[:, None]
            tl.store(parts_ptr + part_at + 1, odd_sums, mask=written)


@dataclass(frozen=True)
class CachedRows:
    """Keys and values of a cache, contiguous."""

    k: Tensor
    """``[B, G, C, D]`` float or int8, ``[B, G, C, D/2]`` uint8."""
    v: Tensor
    """As ``k``."""
    n_valid: Tensor
    """``[B]`` i32."""
    k_scales: Tensor | None = None
    """``[G, D]`` f32."""
    v_scales: Tensor | None = None
    """``[G, D]`` f32."""
    positions: Tensor | None = None
    """``[B, C, 3]`` i32, with ``bias_logits``."""
    bias_logits: Tensor | None = None
    """``[B, 3, P, H]`` f32."""


def attend_cached_rows(q: Tensor, rows: CachedRows) -> Parts:
    """Attention over all rows, in parts ``[splits, B, H, D]``.

    Args:
        q: ``[B, H, D]``.
        rows: what to attend to.
    """
    batch, heads, dim = q.shape
    groups, capacity, elements = rows.k.shape[1:]
    form = "int4" if elements != dim else "float" if rows.k_scales is None else "int8"
    splits = split_count(batch * groups, blocks(capacity, _ROWS))
    parts = Parts.empty(splits, batch, heads, dim, q.device)
    has_bias = rows.bias_logits is not None
    cached_rows_kernel[(splits, groups, batch)](
        q,
        rows.k,
        rows.v,
        q if rows.k_scales is None else rows.k_scales,
        q if rows.v_scales is None else rows.v_scales,
        rows.n_valid if rows.positions is None else rows.positions,
        parts.largest if rows.bias_logits is None else rows.bias_logits,
        rows.n_valid,
        parts.accumulators,
        parts.largest,
        parts.total,
        1.0 / math.sqrt(dim),
        capacity,
        0 if rows.bias_logits is None else rows.bias_logits.shape[2],
        DIM=dim,
        ELEMENTS=elements,
        PADDED=padded(elements, 16),
        SHARING=heads // groups,
        QUERIES=padded(heads // groups, 8),
        ROWS=_ROWS,
        FORM=FORMS[form],
        HAS_BIAS=has_bias,
        WIDEN=triton.knobs.runtime.interpret and q.dtype == torch.bfloat16,
        num_warps=4,
        # Three tiles of 16-bit rows don't fit into the shared memory of small GPUs.
        num_stages=2 if form == "float" else 3,
    )
    return parts
