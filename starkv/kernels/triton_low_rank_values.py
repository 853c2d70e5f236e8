# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Weighted sums of value latents, which all heads share: values are never lifted row by row."""

import math

import torch
import triton
import triton.language as tl

from starkv.kernels.low_rank_call import LowRankCall
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
from starkv.kernels.triton_latents import OFFSET, lane_scales
from starkv.kernels.triton_low_rank_scores import TileScores
from starkv.kernels.triton_shared import blocks, padded

_MOST_HEADS = 32
"""Heads of a program: more of them don't fit into registers beside a tile of values."""
_ELEMENTS = 64
"""Elements of a value row that a program holds: lanes, or bytes of two."""


@triton.jit
def latent_sums_kernel(
    mass_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    values_ptr,
    scales_ptr,
    n_valid_ptr,
    parts_ptr,
    part_max_ptr,
    part_sum_ptr,
    capacity,
    tiles,
    row_units,
    value_lanes,
    outliers,
    chunks,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    UNIT: tl.constexpr,
    FORM: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Σ exp(logit − largest) · latent of some tiles, for a block of heads and some lanes.

    A value row has ``row_units`` · ``UNIT`` elements, which tells the compiler what it is aligned to.
    """
    value_row = row_units * UNIT
    split, sequence = tl.program_id(0), tl.program_id(2)
    chunk, head_block = tl.program_id(1) % chunks, tl.program_id(1) // chunks
    length = held_rows(n_valid_ptr, sequence, capacity)
    used = tl.cdiv(length, ROWS)
    per_split = tl.cdiv(used, tl.num_programs(0))
    head = head_block * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    real_head = head < HEADS
    stats_at = (sequence * HEADS + head).to(tl.int64)
    element = chunk * ELEMENTS + tl.arange(0, ELEMENTS)
    largest = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    sums = tl.zeros([HEAD_BLOCK, ELEMENTS], tl.float32)
    odd_sums = tl.zeros([HEAD_BLOCK, ELEMENTS], tl.float32)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, used)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < length
        at = sequence.to(tl.int64) * capacity + row
        tile_max = tl.load(tile_max_ptr + stats_at * tiles + tile, mask=real_head, other=float("-inf"))
        tile_sum = tl.load(tile_sum_ptr + stats_at * tiles + tile, mask=real_head, other=0.0)
        larger, shift = widen_max(largest, tile_max)
        rescale, weight = tl.exp(largest - shift), tl.exp(tile_max - shift)
        largest = larger
        total = total * rescale + tile_sum * weight
        mass_at = stats_at[:, None] * (tiles * ROWS) + row[None, :]
        mass = tl.load(mass_ptr + mass_at, mask=real_head[:, None], other=0.0)
        weighted = (mass.to(tl.float32) * weight[:, None]).to(mass.dtype)
        stored = inside[:, None] & (element < value_row)[None, :]
        if FORM == INT4:
            codes = tl.load(values_ptr + at[:, None] * value_row + element[None, :], mask=stored, other=0)
            even = ((codes & 15).to(tl.int32) - OFFSET).to(tl.float32)
            odd = ((codes >> 4).to(tl.int32) - OFFSET).to(tl.float32)
            # A byte's lanes are of one block, whose first lane may be the empty one behind the other's last.
            scale = lane_scales(scales_ptr, at, inside, 2 * element, outliers)
            sums = sums * rescale[:, None] + tensor_product(weighted, (even * scale).to(mass.dtype), WIDEN)
            odd_sums = odd_sums * rescale[:, None] + tensor_product(
                weighted, (odd * scale).to(mass.dtype), WIDEN
            )
        else:
            latent = tl.load(values_ptr + at[:, None] * value_row + element[None, :], mask=stored, other=0.0)
            if FORM != FLOAT:
                latent = latent.to(tl.float32) * lane_scales(scales_ptr, at, inside, element, outliers)
            sums = sums * rescale[:, None] + tensor_product(weighted, latent.to(mass.dtype), WIDEN)
    part = (split * tl.num_programs(2) + sequence).to(tl.int64) * HEADS + head
    if chunk == 0:
        tl.store(part_max_ptr + part, largest, mask=real_head)
        tl.store(part_sum_ptr + part, total, mask=real_head)
    if split * per_split < used:
        written = real_head[:, None] & (element < value_row)[None, :]
        part_ptr = parts_ptr + part[:, None] * value_lanes
        if FORM == INT4:
            tl.store(part_ptr + 2 * element[None, :], sums, mask=written)
            tl.store(part_ptr + 2 * element[None, :] + 1, odd_sums, mask=written)
        else:
            tl.store(part_ptr + element[None, :], sums, mask=written)


def latent_sums(call: LowRankCall, scores: TileScores, rows: int) -> Parts:
    """Sums over value latents, ``[splits, B, H, value lanes]``.

    Args:
        call: values and their scales are read.
        scores: from :func:`starkv.kernels.triton_low_rank_scores.tile_scores`.
        rows: of its tiles.
    """
    batch, heads, tiles = scores.largest.shape
    factors = call.factors
    lanes = factors.up_v.shape[1]
    chunks = blocks(factors.value_row, _ELEMENTS)
    head_block = min(padded(heads, 16), _MOST_HEADS)
    programs = chunks * blocks(heads, head_block)
    splits = split_count(batch * programs, tiles)
    parts = Parts.empty(splits, batch, heads, lanes, call.q.device)
    unit = math.gcd(factors.value_row, 16)
    latent_sums_kernel[(splits, programs, batch)](
        scores.mass,
        scores.largest,
        scores.total,
        call.values,
        factors.lanes if call.value_scales is None else call.value_scales,
        call.n_valid,
        parts.accumulators,
        parts.largest,
        parts.total,
        call.keys.shape[1],
        tiles,
        factors.value_row // unit,
        lanes,
        factors.value_outliers,
        chunks,
        HEADS=heads,
        HEAD_BLOCK=head_block,
        ROWS=rows,
        ELEMENTS=_ELEMENTS,
        UNIT=unit,
        FORM=FORMS[factors.form],
        WIDEN=triton.knobs.runtime.interpret and call.q.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=3,
    )
    return parts
