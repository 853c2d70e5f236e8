# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Scores per KV head: the window's attention, pooled along the rows, and the hidden-norm boost."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from starkv.kernels.compress_call import CompressCall
from starkv.kernels.triton_shared import (
    FRAME_CELLS,
    FRAME_ROWS_TO_END,
    blocks,
    parameter_index,
    past_rows,
    valid_length,
)

BOOST, BOOST_TEMPERATURE = parameter_index("boost"), parameter_index("boost_temperature")
_ROWS_PER_PROGRAM = 512
_ROWS_PER_STEP = 1024


@triton.jit
def boost_logit(norm, mean, spread, temperature):
    """What the softmax of the boost takes: the standardised norm, tempered."""
    return (norm - mean) / (spread + 1e-8) / temperature


@triton.jit
def norm_statistics_kernel(
    hidden_norm_ptr,
    kv_len_ptr,
    frame_ptr,
    parameters_ptr,
    statistics_ptr,
    capacity,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean, spread, largest logit and 1 / sum of the softmax over the newest screenshot's hidden norms."""
    pair = tl.program_id(0)
    length = valid_length(kv_len_ptr, pair, capacity, WINDOW)
    start = length - tl.load(frame_ptr + FRAME_ROWS_TO_END)
    first = tl.maximum(start, 0)
    end = tl.minimum(start + tl.load(frame_ptr + FRAME_CELLS), length)
    count = tl.maximum(end - first, 1)
    norms_ptr = hidden_norm_ptr + pair.to(tl.int64) * capacity

    sums = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for step in range(first, end, ROWS):
        row = step + tl.arange(0, ROWS)
        norm = tl.load(norms_ptr + row, mask=row < end, other=0.0)
        sums += norm
        largest = tl.maximum(largest, tl.where(row < end, norm, float("-inf")))
    mean = tl.sum(sums, 0) / count

    squares = tl.zeros([ROWS], tl.float32)
    for step in range(first, end, ROWS):
        row = step + tl.arange(0, ROWS)
        deviation = tl.load(norms_ptr + row, mask=row < end, other=0.0) - mean
        squares += tl.where(row < end, deviation * deviation, 0.0)
    # A screenshot of one cell has no deviation.
    spread = tl.sqrt(tl.sum(squares, 0) / tl.maximum(count - 1, 1))

    temperature = tl.load(parameters_ptr + BOOST_TEMPERATURE)
    largest_logit = boost_logit(tl.max(largest, 0), mean, spread, temperature)
    shares = tl.zeros([ROWS], tl.float32)
    for step in range(first, end, ROWS):
        row = step + tl.arange(0, ROWS)
        norm = tl.load(norms_ptr + row, mask=row < end, other=0.0)
        share = tl.exp(boost_logit(norm, mean, spread, temperature) - largest_logit)
        shares += tl.where(row < end, share, 0.0)
    tl.store(statistics_ptr + 4 * pair, mean)
    tl.store(statistics_ptr + 4 * pair + 1, spread)
    tl.store(statistics_ptr + 4 * pair + 2, largest_logit)
    total = tl.sum(shares, 0)
    tl.store(statistics_ptr + 4 * pair + 3, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def boost_of_rows(
    hidden_norm_ptr, statistics_ptr, frame_ptr, parameters_ptr, pair, row, length, past, capacity
):
    """Extra score of the newest screenshot's rows: shares of ``boost`` in total; 0 elsewhere."""
    offset = row - (length - tl.load(frame_ptr + FRAME_ROWS_TO_END))
    in_frame = (offset >= 0) & (offset < tl.load(frame_ptr + FRAME_CELLS)) & (row < past)
    norm = tl.load(hidden_norm_ptr + pair.to(tl.int64) * capacity + row, mask=in_frame, other=0.0)
    mean, spread = tl.load(statistics_ptr + 4 * pair), tl.load(statistics_ptr + 4 * pair + 1)
    largest_logit = tl.load(statistics_ptr + 4 * pair + 2)
    inverse_sum = tl.load(statistics_ptr + 4 * pair + 3)
    logit = boost_logit(norm, mean, spread, tl.load(parameters_ptr + BOOST_TEMPERATURE))
    mass = tl.load(parameters_ptr + BOOST) * tl.exp(logit - largest_logit) * inverse_sum
    return tl.where(in_frame, mass, 0.0)


@triton.jit
def pooled_mass(mass_ptr, head, row, past, capacity, AVERAGE: tl.constexpr, WIDTH: tl.constexpr):
    """Mean or maximum of a head's mass over ``WIDTH`` rows around each row; rows outside the past count 0."""
    pooled = tl.zeros_like(row).to(tl.float32)
    for tap in range(WIDTH):
        neighbour = row + (tap - WIDTH // 2)
        inside = (neighbour >= 0) & (neighbour < past)
        mass = tl.load(mass_ptr + head.to(tl.int64) * capacity + neighbour, mask=inside, other=0.0)
        pooled = pooled + mass if AVERAGE else tl.maximum(pooled, mass)
    return pooled / WIDTH if AVERAGE else pooled


@triton.jit
def group_scores_kernel(
    mass_ptr,
    hidden_norm_ptr,
    statistics_ptr,
    kv_len_ptr,
    frame_ptr,
    parameters_ptr,
    scores_ptr,
    leading_ptr,
    stages_ptr,
    groups,
    capacity,
    WINDOW: tl.constexpr,
    POOLED_HEADS: tl.constexpr,
    AVERAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Boosted scores of every KV head, the head that leads each row, and the first two stages.

    ``POOLED_HEADS``: heads per KV head that the mass is of.
    """
    pair = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length = valid_length(kv_len_ptr, pair, capacity, WINDOW)
    past = past_rows(kv_len_ptr, pair, capacity, WINDOW)
    is_past = row < past
    boost = tl.zeros([ROWS], tl.float32)
    if (tl.load(parameters_ptr + BOOST) > 0.0) & (tl.load(frame_ptr + FRAME_CELLS) > 0):
        boost = boost_of_rows(
            hidden_norm_ptr, statistics_ptr, frame_ptr, parameters_ptr, pair, row, length, past, capacity
        )
    attention = tl.zeros([ROWS], tl.float32)
    boosted = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    leading = tl.zeros([ROWS], tl.int32)
    for group in range(groups):
        of_group = tl.zeros([ROWS], tl.float32)
        for head in range(POOLED_HEADS):
            mass_head = (pair * groups + group) * POOLED_HEADS + head
            of_group += pooled_mass(mass_ptr, mass_head, row, past, capacity, AVERAGE, WIDTH)
        of_group = tl.where(is_past, of_group / POOLED_HEADS, 0.0)
        score = of_group + boost
        at = (pair.to(tl.int64) * groups + group) * capacity + row
        tl.store(scores_ptr + at, score, mask=row < capacity)
        attention += of_group
        boosted += score
        # Of equal groups the first one leads.
        leading = tl.where(score > best, group, leading)
        best = tl.maximum(best, score)
    tl.store(leading_ptr + pair.to(tl.int64) * capacity + row, leading, mask=row < capacity)
    stage_ptr = stages_ptr + pair.to(tl.int64) * 4 * capacity + row
    tl.store(stage_ptr, attention / groups, mask=row < capacity)
    tl.store(stage_ptr + capacity, boosted / groups, mask=row < capacity)


@dataclass(frozen=True)
class GroupScores:
    """What the later stages read."""

    scores: Tensor
    """``[L, B, G, C]`` f32: boosted, 0 outside the past."""
    leading: Tensor
    """``[L, B, C]`` i32: the KV head with the largest score."""


def group_scores(call: CompressCall, mass: Tensor, stages: Tensor) -> GroupScores:
    """Pool, boost, and take the mean over the heads of each KV head.

    Args:
        call: hidden norms, the newest screenshot and the parameters are read.
        mass: from :func:`starkv.kernels.triton_window.window_mass`.
        stages: ``[L, B, 4, C]`` f32; the first two are written.
    """
    layers, batch, groups, capacity, _ = call.k.shape
    assert call.pooling_kernel % 2 == 1, "an even kernel has no centre"
    assert mass.shape[2] % groups == 0
    assert stages.shape == (layers, batch, 4, capacity)
    device, pairs = call.k.device, layers * batch
    statistics = torch.empty(pairs, 4, dtype=torch.float32, device=device)
    scores = torch.empty(layers, batch, groups, capacity, dtype=torch.float32, device=device)
    leading = torch.empty(layers, batch, capacity, dtype=torch.int32, device=device)
    norm_statistics_kernel[(pairs,)](
        call.hidden_norm,
        call.kv_len,
        call.frame,
        call.parameters,
        statistics,
        capacity,
        WINDOW=call.window,
        ROWS=_ROWS_PER_STEP,
    )
    group_scores_kernel[(blocks(capacity, _ROWS_PER_PROGRAM), pairs)](
        mass,
        call.hidden_norm,
        statistics,
        call.kv_len,
        call.frame,
        call.parameters,
        scores,
        leading,
        stages,
        groups,
        capacity,
        WINDOW=call.window,
        POOLED_HEADS=mass.shape[2] // groups,
        AVERAGE=call.pooling == "avgpool",
        WIDTH=call.pooling_kernel,
        ROWS=_ROWS_PER_PROGRAM,
    )
    return GroupScores(scores, leading)
