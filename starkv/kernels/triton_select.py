# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Which rows stay (``methods/select.py``): the higher priority first, of equal ones the lower row.

Exact whatever the scores: a radix selection over keys that order like priorities finds the lowest one that
stays, a second pass writes the rows in ascending order.
"""

import triton
import triton.language as tl

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.triton_shared import past_rows
from starkv.methods.rows import ROW_PROTECTED as _ROW_PROTECTED

ROW_PROTECTED = tl.constexpr(_ROW_PROTECTED)
LARGEST = tl.constexpr(3.4028234663852886e38)
"""The largest finite float32."""
DIGITS = tl.constexpr(256)
"""Values of 8 bits of a key, which are decided in one pass."""
_ROWS_PER_STEP = 2048


@triton.jit
def priority_keys(scores_ptr, row_meta_ptr, row, past):
    """Priorities of rows as uint32 that order like them.

    +inf in the window, the largest finite number where protected, −inf where a score is not a number; no
    score beats a protected row.
    """
    score = tl.load(scores_ptr + row, mask=row < past, other=0.0)
    is_protected = tl.load(row_meta_ptr + 4 * row + ROW_PROTECTED, mask=row < past, other=0) > 0
    priority = tl.where(score == score, tl.minimum(score, LARGEST / 2), float("-inf"))
    priority = tl.where(is_protected, LARGEST, priority)
    priority = tl.where(row < past, priority, float("inf"))
    # −0 and 0 tie.
    bits = tl.where(priority == 0.0, 0.0, priority).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 0, 0x80000000, 0xFFFFFFFF)


@triton.jit
def lowest_kept_key(scores_ptr, row_meta_ptr, past, length, kept, ROWS: tl.constexpr):
    """The key of the last row that stays, and how many rows with that key do."""
    digit_index = tl.arange(0, DIGITS)
    left = kept
    prefix = (kept * 0).to(tl.uint32)
    decided = prefix
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros([DIGITS], tl.int32)
        for first in range(0, length, ROWS):
            row = first + tl.arange(0, ROWS)
            key = priority_keys(scores_ptr, row_meta_ptr, row, past)
            candidate = (row < length) & ((key & decided) == prefix)
            digit = ((key >> shift) & (DIGITS - 1)).to(tl.int32)
            counts += tl.histogram(digit, DIGITS, mask=candidate)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        chosen = tl.sum((at_least >= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(digit_index > chosen, counts, 0), 0)
        prefix = prefix | (chosen.to(tl.uint32) << shift)
        decided = decided | ((DIGITS - 1) << shift)
    return prefix, left


@triton.jit
def select_kernel(
    scores_ptr,
    row_meta_ptr,
    kv_len_ptr,
    kept_ptr,
    rows_ptr,
    capacity,
    slot_capacity,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The kept rows of one sequence in one layer, ascending; −1 behind the last."""
    pair = tl.program_id(0)
    kept = tl.load(kept_ptr + pair)
    pair_scores_ptr = scores_ptr + pair.to(tl.int64) * capacity
    pair_meta_ptr = row_meta_ptr + pair.to(tl.int64) * capacity * 4
    pair_rows_ptr = rows_ptr + pair.to(tl.int64) * slot_capacity
    if kept > 0:
        past = past_rows(kv_len_ptr, pair, capacity, WINDOW)
        length = past + WINDOW
        lowest, at_lowest = lowest_kept_key(pair_scores_ptr, pair_meta_ptr, past, length, kept, ROWS)
        tied_before = 0
        placed = 0
        for first in range(0, length, ROWS):
            row = first + tl.arange(0, ROWS)
            key = priority_keys(pair_scores_ptr, pair_meta_ptr, row, past)
            tied = ((row < length) & (key == lowest)).to(tl.int32)
            # Of the rows that tie at the cut the first ones fill what is left.
            fills = (tied > 0) & (tied_before + tl.cumsum(tied, 0) <= at_lowest)
            stays = (((row < length) & (key > lowest)) | fills).to(tl.int32)
            place = placed + tl.cumsum(stays, 0) - 1
            tl.store(pair_rows_ptr + place, row.to(tl.int64), mask=stays > 0)
            tied_before += tl.sum(tied, 0)
            placed += tl.sum(stays, 0)
    for first in range(kept, slot_capacity, ROWS):
        place = first + tl.arange(0, ROWS)
        tl.store(pair_rows_ptr + place, tl.full([ROWS], -1, tl.int64), mask=place < slot_capacity)


def select_rows(call: CompressCall, result: CompressResult) -> None:
    """Write ``result.rows`` from its scores and ``new_len``."""
    layers, batch, _, capacity, _ = call.k.shape
    slot_capacity = call.dst_k.shape[3]
    assert result.rows.shape == (layers, batch, 1, slot_capacity)
    select_kernel[(layers * batch,)](
        result.scores,
        call.row_meta,
        call.kv_len,
        result.new_len,
        result.rows,
        capacity,
        slot_capacity,
        WINDOW=call.window,
        ROWS=_ROWS_PER_STEP,
        num_warps=8,
    )
