# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Spatial information in each KV head's scores of the newest screenshot, and its moving average
(``methods/star_kv_stages.py``)."""

import triton
import triton.language as tl
from torch import Tensor

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.triton_shared import (
    FRAME_CELLS,
    FRAME_GRID_COLUMNS,
    FRAME_GRID_ROWS,
    FRAME_ROWS_TO_END,
    padded,
    parameter_index,
)
from starkv.methods.expected_information import SPATIAL_BINS as _SPATIAL_BINS
from starkv.methods.expected_information import VALUE_BINS as _VALUE_BINS

MI_ENABLED, MI_DECAY = parameter_index("mi_enabled"), parameter_index("mi_decay")
MI_CHANCE, MI_SCALE = parameter_index("mi_chance"), parameter_index("mi_scale")
SPATIAL_BINS, VALUE_BINS = tl.constexpr(_SPATIAL_BINS), tl.constexpr(_VALUE_BINS)
PLACES = tl.constexpr(256)
"""Places of the screen, 144, as a power of two."""
_VALUE_BITS = 31
VALUES = tl.constexpr(1 << _VALUE_BITS)
"""Numbers that are at least 0 have float32 bits below this, which order like the numbers."""
CELLS_PER_PASS_STEP, CELLS_PER_COUNT_STEP = tl.constexpr(1024), tl.constexpr(64)


@triton.jit
def rank_key(scores_ptr, cell, cells, INDICES: tl.constexpr):
    """One int64 per cell that orders like (score or 0, cell): no two are equal; the largest one of all
    behind the last cell. ``INDICES`` is a power of two above every cell."""
    score = tl.load(scores_ptr + cell, mask=cell < cells, other=0.0)
    # Of −0 this makes 0, whose bits are the smallest.
    positive = tl.where(score > 0.0, score, 0.0)
    key = positive.to(tl.int32, bitcast=True).to(tl.int64) * INDICES + cell
    return tl.where(cell < cells, key, VALUES * INDICES - 1)


@triton.jit
def bin_boundaries(scores_ptr, cells, INDICES: tl.constexpr, KEY_BITS: tl.constexpr):
    """Smallest key of each of the 16 equally full bins, ``[16]`` int64.

    A radix selection with one bit per pass, all boundaries at once: a boundary is the largest number that at
    most as many keys lie below as its bin's first rank, and it grows from its highest bit on.
    """
    value_bin = tl.arange(0, VALUE_BINS)
    first_rank = (value_bin * cells + VALUE_BINS - 1) // VALUE_BINS
    boundary = tl.zeros([VALUE_BINS], tl.int64)
    bit = tl.full([VALUE_BINS], VALUES * INDICES // 2, tl.int64)
    for _ in range(KEY_BITS):
        raised = boundary | bit
        below = tl.zeros([VALUE_BINS], tl.int32)
        for first in range(0, cells, CELLS_PER_PASS_STEP):
            cell = first + tl.arange(0, CELLS_PER_PASS_STEP)
            key = rank_key(scores_ptr, cell, cells, INDICES)
            below += tl.sum((key[:, None] < raised[None, :]).to(tl.int32), 0)
        boundary = tl.where(below <= first_rank, raised, boundary)
        bit = bit >> 1
    return boundary


@triton.jit
def place_of(cell, grid_rows, grid_columns):
    """Which of the screen's 12 × 12 places the centre of a cell lies in."""
    row = SPATIAL_BINS * (2 * (cell // grid_columns) + 1) // (2 * grid_rows)
    column = SPATIAL_BINS * (2 * (cell % grid_columns) + 1) // (2 * grid_columns)
    return tl.minimum(row, SPATIAL_BINS - 1) * SPATIAL_BINS + tl.minimum(column, SPATIAL_BINS - 1)


@triton.jit
def mutual_information(
    scores_ptr, cells, grid_rows, grid_columns, INDICES: tl.constexpr, KEY_BITS: tl.constexpr
):
    """Plug-in estimate between the bin of a score's rank and its place, nats; 0 where no score is above 0."""
    boundary = bin_boundaries(scores_ptr, cells, INDICES, KEY_BITS)
    value_bin, place = tl.arange(0, VALUE_BINS), tl.arange(0, PLACES)
    counts = tl.zeros([VALUE_BINS, PLACES], tl.float32)
    sums = tl.zeros([CELLS_PER_COUNT_STEP], tl.float32)
    for first in range(0, cells, CELLS_PER_COUNT_STEP):
        cell = first + tl.arange(0, CELLS_PER_COUNT_STEP)
        score = tl.load(scores_ptr + cell, mask=cell < cells, other=0.0)
        sums += tl.where(score < 0.0, 0.0, score)
        key = rank_key(scores_ptr, cell, cells, INDICES)
        own_bin = tl.sum((key[:, None] >= boundary[None, :]).to(tl.int32), 1) - 1
        own_place = place_of(cell, grid_rows, grid_columns)
        # Counting as a product of zeros and ones, exact in float32: no atomics, and tensor cores are quick.
        in_bin = (value_bin[:, None] == own_bin[None, :]) & (cell[None, :] < cells)
        in_place = own_place[:, None] == place[None, :]
        counts = tl.dot(in_bin.to(tl.float16), in_place.to(tl.float16), counts)
    joint = counts.to(tl.float64) / cells
    independent = tl.sum(joint, 1)[:, None] * tl.sum(joint, 0)[None, :]
    gain = tl.log(joint + 1e-12) - tl.log(independent + 1e-12)
    information = tl.maximum(tl.sum(tl.sum(joint * gain, 1), 0), 0.0).to(tl.float32)
    return tl.where((tl.sum(sums, 0) > 1e-12) & (cells > 1), information, 0.0)


@triton.jit
def information_kernel(
    scores_ptr,
    kv_len_ptr,
    kept_ptr,
    frame_ptr,
    parameters_ptr,
    old_average_ptr,
    average_ptr,
    groups,
    capacity,
    INDICES: tl.constexpr,
    KEY_BITS: tl.constexpr,
):
    """The moving average of one KV head's information."""
    group = tl.program_id(0)
    pair = group // groups
    average = tl.load(old_average_ptr + group)
    if (tl.load(parameters_ptr + MI_ENABLED) > 0.0) & (tl.load(kept_ptr + pair) > 0):
        start = tl.load(kv_len_ptr + pair) - tl.load(frame_ptr + FRAME_ROWS_TO_END)
        information = mutual_information(
            scores_ptr + group.to(tl.int64) * capacity + start,
            tl.load(frame_ptr + FRAME_CELLS),
            tl.load(frame_ptr + FRAME_GRID_ROWS),
            tl.load(frame_ptr + FRAME_GRID_COLUMNS),
            INDICES,
            KEY_BITS,
        )
        beyond_chance = tl.maximum(information - tl.load(parameters_ptr + MI_CHANCE), 0.0)
        decay = tl.load(parameters_ptr + MI_DECAY)
        average = decay * average + (1.0 - decay) * beyond_chance * tl.load(parameters_ptr + MI_SCALE)
    tl.store(average_ptr + group, average)


def update_information(call: CompressCall, scores: Tensor, result: CompressResult) -> None:
    """Write ``result.mi_ema``.

    Args:
        call: read.
        scores: ``[L, B, G, C]`` f32.
        result: ``new_len`` is read: where it is 0, the average stays.
    """
    layers, batch, groups, capacity, _ = call.k.shape
    assert scores.shape == (layers, batch, groups, capacity)
    indices = padded(call.pattern_ema.shape[-1])
    information_kernel[(layers * batch * groups,)](
        scores,
        call.kv_len,
        result.new_len,
        call.frame,
        call.parameters,
        call.mi_ema,
        result.mi_ema,
        groups,
        capacity,
        INDICES=indices,
        KEY_BITS=_VALUE_BITS + indices.bit_length() - 1,
        num_warps=8,
    )
