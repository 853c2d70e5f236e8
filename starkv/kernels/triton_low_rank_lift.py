# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""From sums of value latents to heads: Σ p (U c) = U (Σ p c). The tail joins, and the bias is added once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from starkv.kernels.low_rank_call import DecodeResult, LowRankCall
from starkv.kernels.triton_decode import Merged, tensor_product, widen_max
from starkv.kernels.triton_shared import blocks

_CHANNELS = 32
_LANES = 64
_ROWS = 16


@triton.jit
def lift_values_kernel(
    latent_ptr,
    max_ptr,
    sum_ptr,
    tail_ptr,
    tail_max_ptr,
    tail_sum_ptr,
    n_valid_ptr,
    tail_n_valid_ptr,
    up_ptr,
    bias_ptr,
    out_ptr,
    out_max_ptr,
    out_sum_ptr,
    rows,
    capacity,
    tail_capacity,
    lanes,
    SHARING: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    TAIL_HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Lift the latents of a KV head's queries, merge them with the tail, add the bias.

    A row is one query head of one sequence.
    """
    group, chunk, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = block * ROWS + tl.arange(0, ROWS)
    real = row < rows
    sequence = row // SHARING
    at = (sequence * tl.num_programs(0) + group) * SHARING + row % SHARING
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)
    up_ptr += group.to(tl.int64) * lanes * DIM
    lifted = tl.zeros([ROWS, CHANNELS], tl.float32)
    for step in range(0, lanes, LANES):
        lane = step + tl.arange(0, LANES)
        latent = tl.load(
            latent_ptr + at.to(tl.int64)[:, None] * lanes + lane[None, :],
            mask=real[:, None] & (lane < lanes)[None, :],
            other=0.0,
        )
        up = tl.load(
            up_ptr + lane[:, None] * DIM + channel[None, :],
            mask=(lane < lanes)[:, None] & (channel < DIM)[None, :],
            other=0.0,
        )
        lifted += tensor_product(latent, up, WIDEN)
    bias = tl.load(bias_ptr + group * DIM + channel, mask=channel < DIM, other=0.0)[None, :]
    largest = tl.load(max_ptr + at, mask=real, other=float("-inf"))
    total = tl.load(sum_ptr + at, mask=real, other=0.0)
    held = tl.load(n_valid_ptr + sequence, mask=real, other=0)
    sensible = (held >= 0) & (held <= capacity)
    out = lifted + bias
    if HAS_TAIL:
        tail_held = tl.load(tail_n_valid_ptr + sequence, mask=real, other=0)
        sensible = sensible & (tail_held >= 0) & (tail_held <= tail_capacity)
        tail_at = at.to(tl.int64)[:, None] * DIM + channel[None, :]
        tail = tl.load(tail_ptr + tail_at, mask=real[:, None] & (channel < DIM)[None, :], other=0.0)
        if not TAIL_HAS_BIAS:
            tail += bias
        tail_max = tl.load(tail_max_ptr + at, mask=real, other=float("-inf"))
        larger, shift = widen_max(largest, tail_max)
        total = total * tl.exp(largest - shift)
        tail_total = tl.load(tail_sum_ptr + at, mask=real, other=0.0) * tl.exp(tail_max - shift)
        both = total + tail_total
        divisor = tl.where(both == 0.0, 1.0, both)
        out = out * (total / divisor)[:, None] + tail * (tail_total / divisor)[:, None]
        largest, total = larger, both
    attended = sensible & (total != 0.0)
    out = tl.where(attended[:, None], out, 0.0)
    out_at = at.to(tl.int64)[:, None] * DIM + channel[None, :]
    tl.store(
        out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=real[:, None] & (channel < DIM)[None, :]
    )
    if chunk == 0:
        tl.store(out_max_ptr + at, tl.where(attended, largest, float("-inf")), mask=real)
        tl.store(out_sum_ptr + at, tl.where(attended, total, 0.0), mask=real)


def lift_values(call: LowRankCall, packed: Merged, tail: Merged | None) -> DecodeResult:
    """Heads from merged latents.

    Args:
        call: factors, bias and numbers of rows are read.
        packed: attention over cached rows, ``[B, H, value lanes]``.
        tail: attention over the tail, ``[B, H, D]`` f32.
    """
    batch, _, dim = call.q.shape
    factors, raw = call.factors, call.tail
    result = DecodeResult(
        torch.empty_like(call.q), torch.empty_like(packed.largest), torch.empty_like(packed.total)
    )
    rows = batch * call.sharing
    merged_tail: tuple[Tensor, Tensor, Tensor] = (
        (packed.out, packed.largest, packed.total) if tail is None else (tail.out, tail.largest, tail.total)
    )
    lift_values_kernel[(factors.kv_heads, blocks(dim, _CHANNELS), blocks(rows, _ROWS))](
        packed.out,
        packed.largest,
        packed.total,
        *merged_tail,
        call.n_valid,
        call.n_valid if raw is None else raw.n_valid,
        factors.up_v,
        factors.value_bias,
        result.out,
        result.largest,
        result.total,
        rows,
        call.keys.shape[1],
        0 if raw is None else raw.k.shape[2],
        factors.up_v.shape[1],
        SHARING=call.sharing,
        DIM=dim,
        ROWS=_ROWS,
        LANES=_LANES,
        CHANNELS=_CHANNELS,
        HAS_TAIL=raw is not None,
        TAIL_HAS_BIAS=raw is not None and raw.values_have_bias,
        WIDEN=triton.knobs.runtime.interpret and call.q.dtype == torch.bfloat16,
    )
    return result
