# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the kernels of low-rank attention read of a cached row beside its codes: angles and scales."""

import triton
import triton.language as tl

from starkv.kernels.low_rank_factors import CODE_OFFSET

OFFSET = tl.constexpr(CODE_OFFSET)
"""As kernels want it."""


@triton.jit
def pair_positions(positions_ptr, at, inside, pair, SECTION_T: tl.constexpr, SECTION_H: tl.constexpr):
    """``[rows, pairs]``: the component of each row's position that a rotary pair turns by."""
    position_ptr = positions_ptr + at * 3
    t = tl.load(position_ptr, mask=inside, other=0)
    h = tl.load(position_ptr + 1, mask=inside, other=0)
    w = tl.load(position_ptr + 2, mask=inside, other=0)
    by_h_or_w = tl.where(pair[None, :] < SECTION_T + SECTION_H, h[:, None], w[:, None])
    return tl.where(pair[None, :] < SECTION_T, t[:, None], by_h_or_w)


@triton.jit
def row_angles(
    positions_ptr,
    cos_ptr,
    sin_ptr,
    at,
    inside,
    pair,
    table_rows,
    HALF: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
):
    """Cosines and sines ``[rows, pairs]``; NaN where the table knows no such position."""
    position = pair_positions(positions_ptr, at, inside, pair, SECTION_T, SECTION_H)
    known = (position >= 0) & (position < table_rows) & (pair[None, :] < HALF)
    angle = position * HALF + pair[None, :]
    cosines = tl.load(cos_ptr + angle, mask=known, other=float("nan"))
    sines = tl.load(sin_ptr + angle, mask=known, other=float("nan"))
    # Pairs beyond the head's are no positions: they count nothing.
    real = pair[None, :] < HALF
    return tl.where(real, cosines, 0.0), tl.where(real, sines, 0.0)


@triton.jit
def lane_scales(scales_ptr, at, inside, lane, outliers):
    """``[rows, lanes]``: the scale of each lane's block. ``at`` counts pairs of scales."""
    first = tl.load(scales_ptr + 2 * at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(scales_ptr + 2 * at + 1, mask=inside, other=0.0).to(tl.float32)
    return tl.where(lane[None, :] < outliers, first[:, None], second[:, None])
