# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""How stable each KV head's attention over the newest screenshot is, and the moving average it is compared
with (``methods/star_kv_prior.py``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.triton_shared import FRAME_CELLS, FRAME_ROWS_TO_END, parameter_index

TEMPORAL_UPDATE, TEMPORAL_RHO = parameter_index("temporal_update"), parameter_index("temporal_rho")
TEMPORAL_EARLIER = parameter_index("temporal_earlier")
PATTERN_USABLE = parameter_index("pattern_usable")
_CELLS_PER_STEP = 512


@triton.jit
def positive_scores(scores_ptr, cell, cells):
    """Scores of the screenshot's cells, those below 0 as 0."""
    score = tl.load(scores_ptr + cell, mask=cell < cells, other=0.0)
    return tl.where(score < 0.0, 0.0, score)


@triton.jit
def pattern_kernel(
    scores_ptr,
    kv_len_ptr,
    kept_ptr,
    frame_ptr,
    parameters_ptr,
    old_pattern_ptr,
    pattern_ptr,
    stability_ptr,
    groups,
    capacity,
    pattern_length,
    CELLS: tl.constexpr,
):
    """Average the pattern of one KV head; its cosine with what was seen before, clipped to [0, 1]."""
    group = tl.program_id(0)
    pair = group // groups
    old_ptr = old_pattern_ptr + group.to(tl.int64) * pattern_length
    new_ptr = pattern_ptr + group.to(tl.int64) * pattern_length
    cells = 0
    stability = 0.0
    if (tl.load(parameters_ptr + TEMPORAL_UPDATE) > 0.0) & (tl.load(kept_ptr + pair) > 0):
        cells = tl.load(frame_ptr + FRAME_CELLS)
        start = tl.load(kv_len_ptr + pair) - tl.load(frame_ptr + FRAME_ROWS_TO_END)
        frame_scores_ptr = scores_ptr + group.to(tl.int64) * capacity + start
        sums = tl.zeros([CELLS], tl.float32)
        for first in range(0, cells, CELLS):
            sums += positive_scores(frame_scores_ptr, first + tl.arange(0, CELLS), cells)
        total = tl.maximum(tl.sum(sums, 0), 1e-8)

        rho = tl.load(parameters_ptr + TEMPORAL_RHO)
        earlier_wanted = tl.load(parameters_ptr + TEMPORAL_EARLIER)
        products = tl.zeros([CELLS], tl.float32)
        pattern_squares = tl.zeros([CELLS], tl.float32)
        reference_squares = tl.zeros([CELLS], tl.float32)
        for first in range(0, cells, CELLS):
            cell = first + tl.arange(0, CELLS)
            pattern = positive_scores(frame_scores_ptr, cell, cells) / total
            earlier = tl.load(old_ptr + cell, mask=cell < cells, other=0.0)
            updated = rho * earlier + (1.0 - rho) * pattern
            tl.store(new_ptr + cell, updated, mask=cell < cells)
            reference = tl.where(earlier_wanted > 0.0, earlier, updated)
            products += pattern * reference
            pattern_squares += pattern * pattern
            reference_squares += reference * reference
        pattern_norm = tl.maximum(tl.sqrt(tl.sum(pattern_squares, 0)), 1e-8)
        reference_norm = tl.maximum(tl.sqrt(tl.sum(reference_squares, 0)), 1e-8)
        cosine = tl.sum(products, 0) / (pattern_norm * reference_norm)
        # Nothing seen before, nothing to discount.
        seen = 1.0 - earlier_wanted * (1.0 - tl.load(parameters_ptr + PATTERN_USABLE))
        stability = tl.minimum(tl.maximum(cosine, 0.0), 1.0) * seen
    tl.store(stability_ptr + group, stability)
    # What lies behind the screenshot's cells is passed on.
    for first in range(cells, pattern_length, CELLS):
        cell = first + tl.arange(0, CELLS)
        old = tl.load(old_ptr + cell, mask=cell < pattern_length, other=0.0)
        tl.store(new_ptr + cell, old, mask=cell < pattern_length)


def update_pattern(call: CompressCall, scores: Tensor, result: CompressResult) -> Tensor:
    """Write ``result.pattern_ema``.

    Args:
        call: read.
        scores: ``[L, B, G, C]`` f32.
        result: ``new_len`` is read: where it is 0, the average stays.

    Returns:
        stability, ``[L, B, G]`` f32 in [0, 1]; 0 where no pattern is compared.
    """
    layers, batch, groups, capacity, _ = call.k.shape
    assert scores.shape == (layers, batch, groups, capacity)
    stability = torch.empty(layers, batch, groups, dtype=torch.float32, device=call.k.device)
    pattern_kernel[(layers * batch * groups,)](
        scores,
        call.kv_len,
        result.new_len,
        call.frame,
        call.parameters,
        call.pattern_ema,
        result.pattern_ema,
        stability,
        groups,
        capacity,
        call.pattern_ema.shape[-1],
        CELLS=_CELLS_PER_STEP,
    )
    return stability
