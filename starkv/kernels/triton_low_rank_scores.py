# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Logits of low-rank decode attention: lift latents to keys, add the bias, rotate, multiply by queries.

A KV head's keys are lifted once for all query heads that share it, and a tile's angles are read once for
several KV heads. Keys never reach memory. What does is exp(logit − the tile's largest), in the type of the
queries: the next kernel multiplies values by it in that type anyway.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.low_rank_call import LowRankCall
from starkv.kernels.triton_decode import (
    FLOAT,
    FORMS,
    INT4,
    held_rows,
    tensor_product,
)
from starkv.kernels.triton_latents import OFFSET, lane_scales, row_angles
from starkv.kernels.triton_shared import blocks, padded
from starkv.lowrank.latent_format import TILE, KeyLanes

LANE_ALIGNMENT = tl.constexpr(TILE)
_HEADS_PER_PROGRAM = 8
_PROGRAMS = 512
_MOST_LANES = 64
"""Lanes of one step: more of them only take registers."""


@triton.jit
def lifted_part(latent, up_ptr, lane, end, pair, HALF: tl.constexpr, WIDEN: tl.constexpr):
    """What some lanes add to both halves of the keys, each ``[rows, pairs]``."""
    up_at = lane.to(tl.int64)[:, None] * (2 * HALF) + pair[None, :]
    real = (lane < end)[:, None] & (pair[None, :] < HALF)
    up_first = tl.load(up_ptr + up_at, mask=real, other=0.0)
    up_second = tl.load(up_ptr + up_at + HALF, mask=real, other=0.0)
    latent = latent.to(up_first.dtype)
    return tensor_product(latent, up_first, WIDEN), tensor_product(latent, up_second, WIDEN)


@triton.jit
def lifted_scores_kernel(
    q_ptr,
    keys_ptr,
    scales_ptr,
    n_valid_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    up_ptr,
    bias_ptr,
    lanes_ptr,
    mass_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    scale,
    capacity,
    tiles,
    table_rows,
    lane_tiles,
    factors,
    HEADS: tl.constexpr,
    FACTOR_HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FORM: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """exp(logit − largest), largest logit and sum of one tile of rows, for ``HEADS`` KV heads.

    Alignment is said where a compiler can't see it, or bytes would be read one by one.
    """
    tile, block, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = held_rows(n_valid_ptr, sequence, capacity)
    if tile * ROWS < length:
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < length
        at = sequence.to(tl.int64) * capacity + row
        pair = tl.arange(0, PAIRS)
        cosines, sines = row_angles(
            positions_ptr, cos_ptr, sin_ptr, at, inside, pair, table_rows, HALF, SECTION_T, SECTION_H
        )
        row_elements = lane_tiles * (LANE_ALIGNMENT // 2 if FORM == INT4 else LANE_ALIGNMENT)
        query = tl.arange(0, QUERIES)
        query_heads = tl.num_programs(1) * HEADS * SHARING
        for head_of_block in range(HEADS):
            head = block * HEADS + head_of_block
            factor = head // FACTOR_HEADS
            first_lane = tl.multiple_of(tl.load(lanes_ptr + 3 * factor), LANE_ALIGNMENT)
            end = tl.multiple_of(tl.load(lanes_ptr + 3 * factor + 1), LANE_ALIGNMENT)
            outliers = tl.load(lanes_ptr + 3 * factor + 2)
            head_up_ptr = up_ptr + (head % FACTOR_HEADS).to(tl.int64) * lane_tiles * (
                2 * LANE_ALIGNMENT * HALF
            )
            first = tl.zeros([ROWS, PAIRS], tl.float32)
            second = tl.zeros([ROWS, PAIRS], tl.float32)
            for step in range(first_lane, end, LANES):
                if FORM == INT4:
                    # Even and odd lanes are two products: their codes needn't be woven together.
                    byte = step // 2 + tl.arange(0, LANES // 2)
                    stored = inside[:, None] & (byte < end // 2)[None, :]
                    codes = tl.load(
                        keys_ptr + at[:, None] * row_elements + byte[None, :], mask=stored, other=0
                    )
                    for odd in tl.static_range(2):
                        lane = 2 * byte + odd
                        code = (codes >> (4 * odd)) & 15
                        latent = (code.to(tl.int32) - OFFSET).to(tl.float32) * lane_scales(
                            scales_ptr, at * factors + factor, inside, lane - first_lane, outliers
                        )
                        more_first, more_second = lifted_part(
                            latent, head_up_ptr, lane, end, pair, HALF, WIDEN
                        )
                        first += more_first
                        second += more_second
                else:
                    lane = step + tl.arange(0, LANES)
                    stored = inside[:, None] & (lane < end)[None, :]
                    latent = tl.load(
                        keys_ptr + at[:, None] * row_elements + lane[None, :], mask=stored, other=0.0
                    )
                    if FORM != FLOAT:
                        latent = latent.to(tl.float32) * lane_scales(
                            scales_ptr, at * factors + factor, inside, lane - first_lane, outliers
                        )
                    more_first, more_second = lifted_part(latent, head_up_ptr, lane, end, pair, HALF, WIDEN)
                    first += more_first
                    second += more_second
            bias_at = head * (2 * HALF) + pair
            first += tl.load(bias_ptr + bias_at, mask=pair < HALF, other=0.0)[None, :]
            second += tl.load(bias_ptr + bias_at + HALF, mask=pair < HALF, other=0.0)[None, :]
            turned_first = first * cosines - second * sines
            turned_second = second * cosines + first * sines

            query_head = head * SHARING + query
            q_at = (sequence * query_heads + query_head)[None, :] * (2 * HALF) + pair[:, None]
            real = (query < SHARING)[None, :] & (pair < HALF)[:, None]
            q_first = tl.load(q_ptr + q_at, mask=real, other=0.0)
            q_second = tl.load(q_ptr + q_at + HALF, mask=real, other=0.0)
            logits = tensor_product(turned_first.to(q_first.dtype), q_first, WIDEN)
            logits += tensor_product(turned_second.to(q_first.dtype), q_second, WIDEN)
            logits = tl.where(inside[:, None], logits * scale, float("-inf"))
            largest = tl.max(logits, 0)
            mass = tl.exp(logits - largest[None, :])
            stats_at = (sequence * query_heads + query_head).to(tl.int64)
            tl.store(tile_max_ptr + stats_at * tiles + tile, largest, mask=query < SHARING)
            tl.store(tile_sum_ptr + stats_at * tiles + tile, tl.sum(mass, 0), mask=query < SHARING)
            # Rows that the sequence doesn't have get 0, so that nobody needs to ask for them again.
            mass_at = stats_at[None, :] * (tiles * ROWS) + row[:, None]
            mass = mass.to(mass_ptr.dtype.element_ty)
            tl.store(mass_ptr + mass_at, mass, mask=(query < SHARING)[None, :])


@dataclass(frozen=True)
class TileScores:
    """Logits in tiles of rows."""

    mass: Tensor
    """``[B, H, tiles · rows]`` in the type of the queries: exp(logit − the tile's largest), 0 behind the last
    row; undefined in tiles that hold none."""
    largest: Tensor
    """``[B, H, tiles]`` f32."""
    total: Tensor
    """``[B, H, tiles]`` f32: sum of a tile's mass."""


@dataclass(frozen=True)
class ScoreTiles:
    """How the work is cut; the results differ by rounding alone."""

    rows: int = 64
    """Of a tile."""
    warps: int = 8
    """Of a program: a tile of keys, its angles and its logits lie in registers."""
    heads: int | None = None
    """KV heads of a program, which share a tile's angles; a divisor of G. None: :func:`heads_per_program`."""


def lanes_per_step(call: LowRankCall) -> int:
    """The largest step that fills up no factor's lanes; two lanes share a byte in ``int4``, and 16 numbers
    are the least that tensor cores sum over."""
    divisor = math.gcd(*KeyLanes(call.factors.key_ranks).widths)
    power_of_two = divisor & -divisor
    return max(min(_MOST_LANES, power_of_two), 2 * TILE if call.factors.form == "int4" else TILE)


def heads_per_program(kv_heads: int, programs: int) -> int:
    """KV heads that share a tile's angles: as many as leave enough programs for a large GPU.

    Args:
        kv_heads: G.
        programs: tiles of all sequences.
    """
    fitting = [
        heads
        for heads in range(1, min(kv_heads, _HEADS_PER_PROGRAM) + 1)
        if kv_heads % heads == 0 and programs * (kv_heads // heads) >= _PROGRAMS
    ]
    return max(fitting, default=1)


def tile_scores(call: LowRankCall, cut: ScoreTiles) -> TileScores:
    """Logits of all cached rows.

    Raises:
        UsageError: the cut's programs can't share the KV heads evenly.
    """
    batch, heads, dim = call.q.shape
    capacity, factors, where = call.keys.shape[1], call.factors, call.where
    tiles = blocks(capacity, cut.rows)
    device = call.q.device
    scores = TileScores(
        torch.empty(batch, heads, tiles * cut.rows, dtype=call.q.dtype, device=device),
        torch.empty(batch, heads, tiles, dtype=torch.float32, device=device),
        torch.empty(batch, heads, tiles, dtype=torch.float32, device=device),
    )
    together = cut.heads or heads_per_program(factors.kv_heads, tiles * batch)
    if factors.kv_heads % together:
        raise UsageError(f"programs of {together} KV heads can't share {factors.kv_heads} evenly")
    lifted_scores_kernel[(tiles, factors.kv_heads // together, batch)](
        call.q,
        call.keys,
        factors.lanes if call.key_scales is None else call.key_scales,
        call.n_valid,
        where.positions,
        where.cosines,
        where.sines,
        factors.up_k,
        factors.key_bias,
        factors.lanes,
        scores.mass,
        scores.largest,
        scores.total,
        1.0 / math.sqrt(dim),
        capacity,
        tiles,
        len(where.cosines),
        factors.key_lanes // TILE,
        len(factors.key_ranks),
        HEADS=together,
        FACTOR_HEADS=factors.up_k.shape[0],
        SHARING=call.sharing,
        QUERIES=padded(call.sharing, 8),
        HALF=dim // 2,
        PAIRS=padded(dim // 2, 16),
        SECTION_T=where.sections[0],
        SECTION_H=where.sections[1],
        ROWS=cut.rows,
        LANES=lanes_per_step(call),
        FORM=FORMS[factors.form],
        WIDEN=triton.knobs.runtime.interpret and call.q.dtype == torch.bfloat16,
        num_warps=cut.warps,
        num_stages=2,
    )
    return scores
