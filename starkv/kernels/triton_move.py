# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Move the kept rows of keys, values and metadata to the front of their slot."""

import triton
import triton.language as tl
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.triton_shared import blocks, padded

_STEP_BYTES = 16 * 1024
"""Rows that a program holds in registers."""


@triton.jit
def move_kernel(
    source_ptr,
    destination_ptr,
    rows_ptr,
    kept_ptr,
    slot_ptr,
    groups,
    batch,
    capacity,
    slots,
    slot_capacity,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copy rows of one KV head, steps of ``ROWS`` of them divided among the programs of axis 0.

    Source and destination may be the same memory if one program has all steps: it takes them in ascending
    order, and a kept row never moves up. So no step overwrites what a later one reads, and within a step all
    warps have read before the first one writes.
    """
    program, programs, group = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    pair = group // groups
    layer, sequence = pair // batch, pair % batch
    kept = tl.load(kept_ptr + pair)
    target = (layer * slots + tl.load(slot_ptr + sequence)) * groups + group % groups
    column = tl.arange(0, COLUMNS)[None, :]
    for first in range(program * ROWS, kept, programs * ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(rows_ptr + pair.to(tl.int64) * slot_capacity + place, mask=place < kept, other=0)
        inside = (place[:, None] < kept) & (column < WIDTH)
        source = (group.to(tl.int64) * capacity + row[:, None]) * WIDTH + column
        values = tl.load(source_ptr + source, mask=inside, other=0)
        tl.debug_barrier()
        destination = (target.to(tl.int64) * slot_capacity + place[:, None]) * WIDTH + column
        tl.store(destination_ptr + destination, values, mask=inside)


def is_in_place(call: CompressCall) -> bool:
    """Whether the destination is the source itself.

    Raises:
        UsageError: it is in part, or of another shape.
    """
    pairs = ((call.k, call.dst_k), (call.v, call.dst_v), (call.row_meta, call.dst_meta))
    same = [source.data_ptr() == destination.data_ptr() for source, destination in pairs]
    if not any(same):
        return False
    if not all(same) or call.k.shape != call.dst_k.shape:
        raise UsageError("k, v and row_meta must all be compacted in place, each in its own shape, or none")
    return True


def move_rows(call: CompressCall, result: CompressResult, in_place: bool) -> None:
    """Write the destination.

    Args:
        call: read, and ``dst_k``, ``dst_v`` and ``dst_meta`` written.
        result: ``rows`` and ``new_len`` are read.
        in_place: see :func:`is_in_place`.
    """
    groups = call.k.shape[2]
    _move(call, result, call.k, call.dst_k, groups, in_place)
    _move(call, result, call.v, call.dst_v, groups, in_place)
    _move(call, result, call.row_meta, call.dst_meta, 1, in_place)


def _move(
    call: CompressCall,
    result: CompressResult,
    source: Tensor,
    destination: Tensor,
    groups: int,
    in_place: bool,
) -> None:
    layers, batch, capacity = call.row_meta.shape[:3]
    slots, slot_capacity = destination.shape[1], destination.shape[-2]
    width = source.shape[-1]
    assert source.dtype == destination.dtype
    columns = padded(width)
    rows = max(1, _STEP_BYTES // (columns * source.element_size()))
    programs = 1 if in_place else blocks(slot_capacity, rows)
    move_kernel[(programs, layers * batch * groups)](
        source,
        destination,
        result.rows,
        result.new_len,
        call.slot,
        groups,
        batch,
        capacity,
        slots,
        slot_capacity,
        WIDTH=width,
        COLUMNS=columns,
        ROWS=rows,
    )
