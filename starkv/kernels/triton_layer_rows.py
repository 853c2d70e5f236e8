# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Entropy of each layer's scores, and the rows that each layer keeps by it (``methods/star_kv_stages.py``).

Here it is also decided which sequences cannot be compressed, because only here all layers come together.
"""

import torch
import triton
import triton.language as tl

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.triton_shared import (
    FRAME_CELLS,
    FRAME_GRID_COLUMNS,
    FRAME_GRID_ROWS,
    FRAME_ROWS_TO_END,
    padded,
    parameter_index,
    past_rows,
)

ENTROPY_MIN, ENTROPY_MAX = parameter_index("entropy_min"), parameter_index("entropy_max")
ENTROPY_SMOOTH = parameter_index("entropy_smooth")
_ROWS_PER_STEP = 1024


@triton.jit
def entropy_kernel(
    base_ptr,
    kv_len_ptr,
    parameters_ptr,
    old_temperature_ptr,
    needed_ptr,
    temperature_ptr,
    capacity,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """How many rows a layer's scores are spread over, and the temperature that follows from it.

    ``base_ptr``: the second of a pair's stages, the boosted scores.
    """
    pair = tl.program_id(0)
    past = past_rows(kv_len_ptr, pair, capacity, WINDOW)
    scores_ptr = base_ptr + (pair.to(tl.int64) * 4 + 1) * capacity
    sums = tl.zeros([ROWS], tl.float32)
    for first in range(0, past, ROWS):
        row = first + tl.arange(0, ROWS)
        sums += tl.load(scores_ptr + row, mask=row < past, other=0.0)
    total = tl.maximum(tl.sum(sums, 0), 1e-8)
    surprise = tl.zeros([ROWS], tl.float32)
    for first in range(0, past, ROWS):
        row = first + tl.arange(0, ROWS)
        share = tl.load(scores_ptr + row, mask=row < past, other=0.0) / total
        surprise -= share * tl.log(share + 1e-8)
    most = tl.log(tl.maximum(past, 1).to(tl.float64))
    normalized = tl.sum(surprise, 0) / (most + 1e-8).to(tl.float32)
    tl.store(needed_ptr + pair, tl.exp(normalized * most.to(tl.float32)))

    least = tl.load(parameters_ptr + ENTROPY_MIN)
    fresh = least + (tl.load(parameters_ptr + ENTROPY_MAX) - least) * normalized
    smooth = tl.load(parameters_ptr + ENTROPY_SMOOTH)
    temperature = smooth * tl.load(old_temperature_ptr + pair) + (1.0 - smooth) * fresh
    tl.store(temperature_ptr + pair, temperature)


@triton.jit
def layer_share(factor, weight, floor, ceiling):
    """Rows of a layer that needs ``weight`` of them, between two limits, in float64."""
    return tl.minimum(tl.maximum(factor * weight, floor), ceiling)


@triton.jit
def layer_weight(needed):
    """Scores that are not numbers say nothing of what a layer needs."""
    return tl.where(needed == needed, needed, 1.0).to(tl.float64)


@triton.jit
def share_factor(needed_ptr, mean, floor, ceiling, layers, batch, LAYERS: tl.constexpr):
    """The factor at which the layers' shares of one sequence sum to ``mean · layers``, in float64.

    The total is piecewise linear in the factor, with knees where a layer meets a limit.
    """
    layer = tl.arange(0, LAYERS)[None, :]
    needed = tl.load(needed_ptr + layer * batch, mask=layer < layers, other=1.0)
    limit = tl.where(tl.arange(0, 2)[:, None] == 0, floor, ceiling)
    knees = limit / layer_weight(needed)
    totals = tl.zeros([2, LAYERS], tl.float64)
    for other in range(layers):
        weight = layer_weight(tl.load(needed_ptr + other * batch))
        totals += layer_share(knees, weight, floor, ceiling)
    wanted = mean * layers
    # A knee's own total is only as exact as a division and a multiplication.
    below = (totals <= wanted + 1e-6) & (layer < layers)
    above = (totals >= wanted - 1e-6) & (layer < layers)
    low = tl.max(tl.max(tl.where(below, knees, 0.0), 1), 0)
    high = tl.min(tl.min(tl.where(above, knees, float("inf")), 1), 0)
    low_total = tl.max(tl.max(tl.where(below, totals, 0.0), 1), 0)
    high_total = tl.min(tl.min(tl.where(above, totals, float("inf")), 1), 0)
    way = (wanted - low_total) / tl.maximum(high_total - low_total, 1e-9)
    return low + tl.minimum(tl.maximum(way, 0.0), 1.0) * (high - low)


@triton.jit
def is_frame_inside(frame_ptr, length, pattern_length, WINDOW: tl.constexpr):
    """Whether the newest screenshot's competing rows lie before the window, and its pattern fits."""
    cells = tl.load(frame_ptr + FRAME_CELLS)
    start = length - tl.load(frame_ptr + FRAME_ROWS_TO_END)
    has_grid = (tl.load(frame_ptr + FRAME_GRID_ROWS) > 0) & (tl.load(frame_ptr + FRAME_GRID_COLUMNS) > 0)
    inside = (cells > 0) & (cells <= pattern_length) & (start >= 0) & (start + cells <= length - WINDOW)
    return (cells == 0) | (inside & has_grid)


@triton.jit
def layer_rows_kernel(
    needed_ptr,
    fresh_temperature_ptr,
    old_temperature_ptr,
    kv_len_ptr,
    frame_ptr,
    limits_ptr,
    slot_ptr,
    kept_ptr,
    temperature_ptr,
    layers,
    capacity,
    slots,
    slot_capacity,
    pattern_length,
    IN_PLACE: tl.constexpr,
    WINDOW: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """Rows that the layers of one sequence keep, their window included; 0 in all of them where one of them
    cannot be compressed, whose temperature then stays."""
    sequence, batch = tl.program_id(0), tl.num_programs(0)
    mean = tl.load(limits_ptr).to(tl.float64)
    floor = tl.load(limits_ptr + 1).to(tl.float64)
    ceiling = tl.load(limits_ptr + 2).to(tl.float64)
    factor = share_factor(needed_ptr + sequence, mean, floor, ceiling, layers, batch, LAYERS)

    layer = tl.arange(0, LAYERS)
    kept = tl.zeros([LAYERS], tl.int32)
    # What the running total grows by, rounded, so that the sum is exact.
    running = mean * 0.0
    given = mean * 0.0
    for other in range(layers):
        weight = layer_weight(tl.load(needed_ptr + other * batch + sequence))
        running += layer_share(factor, weight, floor, ceiling)
        up_to_here = tl.floor(running + 0.50000095367431640625)
        kept = tl.where(layer == other, (up_to_here - given).to(tl.int32) + WINDOW, kept)
        given = up_to_here

    inside = layer < layers
    pair = layer * batch + sequence
    length = tl.load(kv_len_ptr + pair, mask=inside, other=0)
    slot = tl.load(slot_ptr + sequence)
    fits = (length > WINDOW) & (length <= capacity) & (kept <= length) & (kept <= slot_capacity)
    fits = fits & is_frame_inside(frame_ptr, length, pattern_length, WINDOW)
    fits = fits & (slot >= 0) & (slot < slots)
    if IN_PLACE:
        fits = fits & (slot == sequence)
    accepted = tl.min(tl.where(inside, fits.to(tl.int32), 1), 0) > 0
    tl.store(kept_ptr + pair, tl.where(accepted, kept, 0), mask=inside)
    fresh = tl.load(fresh_temperature_ptr + pair, mask=inside, other=0.0)
    old = tl.load(old_temperature_ptr + pair, mask=inside, other=0.0)
    tl.store(temperature_ptr + pair, tl.where(accepted, fresh, old), mask=inside)


def layer_rows(call: CompressCall, result: CompressResult, in_place: bool) -> None:
    """Write ``result.new_len`` and ``result.temperature``.

    Args:
        call: read.
        result: its first two stages are read.
        in_place: the destination is the source; then each sequence must be its own slot.
    """
    layers, batch, _, capacity, _ = call.k.shape
    assert layers > 0
    needed = torch.empty(layers, batch, dtype=torch.float32, device=call.k.device)
    fresh_temperature = torch.empty_like(needed)
    entropy_kernel[(layers * batch,)](
        result.stages,
        call.kv_len,
        call.parameters,
        call.temperature,
        needed,
        fresh_temperature,
        capacity,
        WINDOW=call.window,
        ROWS=_ROWS_PER_STEP,
    )
    layer_rows_kernel[(batch,)](
        needed,
        fresh_temperature,
        call.temperature,
        call.kv_len,
        call.frame,
        call.limits,
        call.slot,
        result.new_len,
        result.temperature,
        layers,
        capacity,
        call.dst_k.shape[1],
        call.dst_k.shape[3],
        call.pattern_ema.shape[-1],
        IN_PLACE=in_place,
        WINDOW=call.window,
        LAYERS=padded(layers),
    )
