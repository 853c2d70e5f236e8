# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the kernels of decode attention share: which rows a sequence has, and how parts merge.

Rows are split among programs. Each part has, per query head, its largest logit, the sum of exp(logit −
largest) and an accumulator of exp(logit − largest) · value; parts merge as in flash-decoding.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from starkv.kernels.triton_shared import blocks, padded

FLOAT, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FORMS = {"float": 0, "int8": 1, "int4": 2}
"""How kernels know what a row holds."""
HEAD_DIMS = (32, 64, 80, 96, 128)
MAX_HEADS = 128
"""Query heads."""
MAX_SHARING = 32
"""Query heads of a KV head: a program holds all of them."""
MAX_BATCH = 65535
"""Sequences, and sequences times heads: an axis of a launch."""
MAX_SPLITS = 64
_PROGRAMS = 512
"""Programs that a launch should have, if there are rows enough: a few per multiprocessor of a large GPU."""
_MERGED_CHANNELS = 64


def split_count(programs: int, tiles: int) -> int:
    """Among how many programs the rows of a sequence are split.

    Args:
        programs: that the launch has without splitting.
        tiles: of rows that a cache holds.
    """
    return max(1, min(blocks(_PROGRAMS, programs), tiles, MAX_SPLITS))


@triton.jit
def held_rows(n_valid_ptr, sequence, capacity):
    """Rows of a sequence; 0 where the number makes no sense."""
    rows = tl.load(n_valid_ptr + sequence)
    return tl.where((rows > 0) & (rows <= capacity), rows, 0)


@triton.jit
def tensor_product(a, b, WIDEN: tl.constexpr):
    """a · b in float32. ``WIDEN``: Triton's interpreter would multiply bits of bfloat16 as whole numbers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def widen_max(largest, candidate):
    """The larger of two maxima, and what to subtract so that −inf − (−inf) never occurs."""
    larger = tl.maximum(largest, candidate)
    return larger, tl.where(larger == float("-inf"), 0.0, larger)


@triton.jit
def merge_kernel(
    parts_ptr,
    part_max_ptr,
    part_sum_ptr,
    bias_ptr,
    merged_ptr,
    max_ptr,
    sum_ptr,
    splits,
    channels,
    heads,
    SHARING: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Merge one head's parts; divide by the sum, add the bias of its KV head. 0 where there was no row."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)
    part_max = tl.load(part_max_ptr + split * rows + row, mask=split < splits, other=float("-inf"))
    part_sum = tl.load(part_sum_ptr + split * rows + row, mask=split < splits, other=0.0)
    largest = tl.max(part_max, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp(part_max - shift)
    total = tl.sum(weight * part_sum, 0)
    # Parts without rows were never written.
    written = (part_max > float("-inf"))[:, None] & (channel < channels)[None, :]
    part = tl.load(
        parts_ptr + (split[:, None] * rows + row) * channels + channel[None, :], mask=written, other=0.0
    )
    merged = tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    if HAS_BIAS:
        bias_at = (row % heads) // SHARING * channels + channel
        bias = tl.load(bias_ptr + bias_at, mask=channel < channels, other=0.0)
        merged = tl.where(total == 0.0, 0.0, merged + bias)
    merged_at = row.to(tl.int64) * channels + channel
    tl.store(merged_ptr + merged_at, merged.to(merged_ptr.dtype.element_ty), mask=channel < channels)
    if chunk == 0:
        tl.store(max_ptr + row, largest)
        tl.store(sum_ptr + row, total)


@dataclass(frozen=True)
class Parts:
    """What programs leave for :func:`merge`."""

    accumulators: Tensor
    """``[splits, B, H, channels]`` f32."""
    largest: Tensor
    """``[splits, B, H]`` f32."""
    total: Tensor
    """``[splits, B, H]`` f32."""

    @classmethod
    def empty(cls, splits: int, batch: int, heads: int, channels: int, device: torch.device) -> "Parts":
        """Uninitialised ones."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(splits, batch, heads, *shape, dtype=torch.float32, device=device)

        return cls(empty(channels), empty(), empty())


@dataclass(frozen=True)
class Merged:
    """Attention over a part of all rows."""

    out: Tensor
    """``[B, H, channels]``, divided by ``total``."""
    largest: Tensor
    """``[B, H]`` f32."""
    total: Tensor
    """``[B, H]`` f32."""


def merge(parts: Parts, dtype: torch.dtype, bias: Tensor | None = None) -> Merged:
    """Merge the parts of every head.

    Args:
        parts: of all rows.
        dtype: of the result.
        bias: ``[G, channels]`` f32, added once.
    """
    splits, batch, heads, channels = parts.accumulators.shape
    device = parts.accumulators.device
    merged = Merged(
        torch.empty(batch, heads, channels, dtype=dtype, device=device),
        torch.empty(batch, heads, dtype=torch.float32, device=device),
        torch.empty(batch, heads, dtype=torch.float32, device=device),
    )
    merge_kernel[(batch * heads, blocks(channels, _MERGED_CHANNELS))](
        parts.accumulators,
        parts.largest,
        parts.total,
        parts.accumulators if bias is None else bias,
        merged.out,
        merged.largest,
        merged.total,
        splits,
        channels,
        heads,
        SHARING=1 if bias is None else heads // bias.shape[0],
        SPLITS=padded(splits),
        CHANNELS=_MERGED_CHANNELS,
        HAS_BIAS=bias is not None,
    )
    return merged
