# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What several kernels of ``Compress`` share: names of its parameters, and which rows they may touch.

Symbols are those of ``compress_call.py``. Kernels take bare pointers to contiguous tensors, and count
(layer, sequence) pairs, KV heads and query heads of all layers through: ``pair`` in 0 … L · B − 1, ``group``
in 0 … L · B · G − 1, ``head`` in 0 … L · B · H − 1. Their arithmetic is float32 unless they say otherwise.
"""

from dataclasses import fields

import triton
import triton.language as tl

from starkv.methods.star_kv_plan import StarKVPlan

_NAMES = [field.name for field in fields(StarKVPlan)]


def parameter_index(name: str) -> tl.constexpr:
    """Where a field of :class:`StarKVPlan` lies in ``parameters``, as kernels want it."""
    return tl.constexpr(_NAMES.index(name))


def padded(size: int, least: int = 1) -> int:
    """The next power of two, since blocks of a kernel have no other sizes.

    Args:
        size: what the block must hold.
        least: it holds at least that much.
    """
    return max(least, 1 << (size - 1).bit_length())


def blocks(size: int, block: int) -> int:
    """How many blocks hold ``size`` elements."""
    return -(-size // block)


FRAME_INDEX, FRAME_ROWS_TO_END, FRAME_CELLS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FRAME_GRID_ROWS, FRAME_GRID_COLUMNS = tl.constexpr(3), tl.constexpr(4)
"""Where the fields of :class:`Frame` lie in ``frame``."""


@triton.jit
def valid_length(kv_len_ptr, pair, capacity, WINDOW: tl.constexpr):
    """Rows of a sequence, or 0 where it holds more than its cache or nothing beside its window."""
    length = tl.load(kv_len_ptr + pair)
    return tl.where((length > WINDOW) & (length <= capacity), length, 0)


@triton.jit
def past_rows(kv_len_ptr, pair, capacity, WINDOW: tl.constexpr):
    """Rows that compete: those before the window; 0 where the sequence cannot be compressed."""
    return tl.maximum(valid_length(kv_len_ptr, pair, capacity, WINDOW) - WINDOW, 0)
