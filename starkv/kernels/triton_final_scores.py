# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Final scores: the spatial prior's weight, the temporal discount and the entropy's power
(``methods/star_kv_stages.py``)."""

import triton
import triton.language as tl
from torch import Tensor

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.triton_shared import FRAME_INDEX, blocks, padded, parameter_index, past_rows
from starkv.methods.rows import ROW_FRAME as _ROW_FRAME

MI_WEIGHT, MI_TAU = parameter_index("mi_weight"), parameter_index("mi_tau")
MI_STRETCH, MI_USABLE = parameter_index("mi_stretch"), parameter_index("mi_usable")
TEMPORAL_APPLY, TEMPORAL_DELTA = parameter_index("temporal_apply"), parameter_index("temporal_delta")
TEMPORAL_EPS, TEMPORAL_FLOOR = parameter_index("temporal_eps"), parameter_index("temporal_floor")
ENTROPY_POWER = parameter_index("entropy_power")
ROW_FRAME = tl.constexpr(_ROW_FRAME)
_ROWS_PER_PROGRAM = 512


@triton.jit
def tempered_information(information, least, width, stretch, tau):
    """What the softmax over groups takes: information, stretched to 0 … 1 if wanted, over tau."""
    stretched = tl.where(width < 1e-12, 0.5, (information - least) / tl.maximum(width, 1e-12))
    return tl.where(stretch > 0.0, stretched, information) / tau


@triton.jit
def leading_weight(average_ptr, leading, parameters_ptr, groups, GROUPS: tl.constexpr):
    """Weight of each row's leading group, 1 on average: softmax of the groups' information."""
    group = tl.arange(0, GROUPS)
    information = tl.load(average_ptr + group, mask=group < groups, other=0.0)
    least = tl.min(tl.where(group < groups, information, float("inf")), 0)
    width = tl.max(tl.where(group < groups, information, float("-inf")), 0) - least
    stretch, tau = tl.load(parameters_ptr + MI_STRETCH), tl.load(parameters_ptr + MI_TAU)
    logits = tempered_information(information, least, width, stretch, tau)
    logits = tl.where(group < groups, logits, float("-inf"))
    largest = tl.max(logits, 0)
    own = tempered_information(tl.load(average_ptr + leading), least, width, stretch, tau)
    return tl.exp(own - largest) / tl.sum(tl.exp(logits - largest), 0) * groups


@triton.jit
def temporal_discount(distance, stability, parameters_ptr):
    """Discount of rows of older screenshots, the deeper the more stable their group's attention is."""
    least, floor = tl.load(parameters_ptr + TEMPORAL_EPS), tl.load(parameters_ptr + TEMPORAL_FLOOR)
    way = distance * (least + (1.0 - least) * stability)
    return floor + (1.0 - floor) * tl.exp(-tl.load(parameters_ptr + TEMPORAL_DELTA) * way)


@triton.jit
def sharpened(scores, temperature):
    """``max(score, 0) ^ (1 / temperature)``."""
    positive = scores > 0.0
    power = tl.exp(tl.log(tl.where(positive, scores, 1.0)) / temperature)
    return tl.where(positive, power, 0.0)


@triton.jit
def final_scores_kernel(
    leading_ptr,
    average_ptr,
    stability_ptr,
    temperature_ptr,
    kv_len_ptr,
    row_meta_ptr,
    frame_ptr,
    parameters_ptr,
    stages_ptr,
    scores_ptr,
    groups,
    capacity,
    WINDOW: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The last two stages and the final scores of some rows of one sequence in one layer."""
    pair = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_past = row < past_rows(kv_len_ptr, pair, capacity, WINDOW)
    at = pair.to(tl.int64) * capacity + row
    stage_ptr = stages_ptr + pair.to(tl.int64) * 4 * capacity + row
    base = tl.load(stage_ptr + capacity, mask=is_past, other=0.0)
    leading = tl.load(leading_ptr + at, mask=is_past, other=0)

    weight = tl.full([ROWS], 1.0, tl.float32)
    if tl.load(parameters_ptr + MI_USABLE) > 0.0:
        weight = leading_weight(average_ptr + pair * groups, leading, parameters_ptr, groups, GROUPS)
    strength = tl.load(parameters_ptr + MI_WEIGHT)
    weighted = base * ((1.0 - strength) + strength * weight)

    discounted = weighted
    if tl.load(parameters_ptr + TEMPORAL_APPLY) > 0.0:
        row_frame = tl.load(row_meta_ptr + 4 * at + ROW_FRAME, mask=is_past, other=-1)
        distance = tl.where(row_frame >= 0, tl.load(frame_ptr + FRAME_INDEX) - row_frame, 0)
        stability = tl.load(stability_ptr + pair * groups + leading)
        discounted = weighted * temporal_discount(distance.to(tl.float32), stability, parameters_ptr)

    final = discounted
    if tl.load(parameters_ptr + ENTROPY_POWER) > 0.0:
        final = sharpened(discounted, tl.load(temperature_ptr + pair))
    tl.store(stage_ptr + 2 * capacity, weighted, mask=row < capacity)
    tl.store(stage_ptr + 3 * capacity, discounted, mask=row < capacity)
    tl.store(scores_ptr + at, final, mask=row < capacity)


def final_scores(call: CompressCall, leading: Tensor, stability: Tensor, result: CompressResult) -> None:
    """Write ``result.scores`` and the last two of ``result.stages``.

    Args:
        call: read.
        leading: ``[L, B, C]`` i32: the KV head that each row's weight and stability are of.
        stability: ``[L, B, G]`` f32.
        result: the new state and the second stage are read.
    """
    layers, batch, groups, capacity, _ = call.k.shape
    assert leading.shape == (layers, batch, capacity)
    assert stability.shape == (layers, batch, groups)
    final_scores_kernel[(blocks(capacity, _ROWS_PER_PROGRAM), layers * batch)](
        leading,
        result.mi_ema,
        stability,
        result.temperature,
        call.kv_len,
        call.row_meta,
        call.frame,
        call.parameters,
        result.stages,
        result.scores,
        groups,
        capacity,
        WINDOW=call.window,
        GROUPS=padded(groups),
        ROWS=_ROWS_PER_PROGRAM,
    )
