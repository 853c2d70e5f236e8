# SPDX-License-Identifier: Apache-2.0
"""What ``low_rank_gpu.py`` times: decode attention over dense and compressed caches, checked by PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from starkv.kernels.cached_positions import CachedPositions
from starkv.kernels.low_rank_call import LowRankCall
from starkv.kernels.low_rank_factors import LatentForm
from starkv.kernels.low_rank_reference import reference_low_rank_attention
from starkv.kernels.quantized_rows_call import QuantizedRowsCall, reference_quantized_rows
from starkv.kernels.triton_cached_rows import CachedRows, attend_cached_rows
from starkv.kernels.triton_decode import merge
from starkv.kernels.triton_low_rank import low_rank_attention
from starkv.kernels.triton_quantized_rows import quantized_rows_attention
from starkv.validation.low_rank_cases import DecodeShape, low_rank_case, quantized_case

DENSE = ("dense, SDPA", "dense, Triton")
TYPE = torch.bfloat16
POSITION_BYTES = 3 * 4
CHECKED_BYTES = 4 << 30
"""A sequence is compared if its keys in float32 don't take more."""
TOLERANCE = 2e-2
"""Of the largest output."""


@dataclass(frozen=True)
class Runner:
    """An implementation on tensors of its own."""

    run: Callable[[], Tensor]
    """Gives ``[B, H, D]``."""
    bytes_read: int
    """What one run must read at least."""
    expected: Callable[[], Tensor] | None = None
    """The first sequence's ``[1, H, D]`` by PyTorch in float32; None where that takes too much memory."""


def runners_of(shape: DecodeShape, device: torch.device) -> dict[str, Runner]:
    """All implementations, by name, on random tensors; every sequence is full."""
    runners = dense_runners(shape, device)
    forms: tuple[LatentForm, ...] = ("float", "int8", "int4")
    for form in forms:
        name = "bf16" if form == "float" else form
        runners[f"low-rank {name}"] = low_rank_runner(low_rank_case(shape, form, TYPE, device), shape)
    for form in forms[1:]:
        runners[f"quantized {form}"] = quantized_runner(quantized_case(shape, form, TYPE, device), shape)
    return runners


def checkable(shape: DecodeShape) -> bool:
    """Whether PyTorch can hold one sequence's keys in float32."""
    return shape.capacity * shape.kv_heads * shape.dim * 4 <= CHECKED_BYTES


def dense_runners(shape: DecodeShape, device: torch.device) -> dict[str, Runner]:
    """A static cache in bfloat16, which also holds what is the tail elsewhere."""
    batch, rows = len(shape.rows), shape.capacity + shape.tail_capacity
    q = torch.randn(batch, shape.heads, shape.dim, device=device, dtype=TYPE)
    k, v = (torch.randn(batch, shape.kv_heads, rows, shape.dim, device=device, dtype=TYPE) for _ in range(2))
    held = CachedRows(k, v, torch.full((batch,), rows, dtype=torch.int32, device=device))
    shared = shape.heads != shape.kv_heads

    def expected() -> Tensor:
        first = (tensor[:1].float() for tensor in (q[:, :, None], k, v))
        return F.scaled_dot_product_attention(*first, enable_gqa=shared)[:, :, 0]

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=shared)[:, :, 0]

    def triton() -> Tensor:
        return merge(attend_cached_rows(q, held), TYPE).out

    size = 2 * k.numel() * 2
    checked = expected if checkable(shape) else None
    return dict(zip(DENSE, (Runner(sdpa, size, checked), Runner(triton, size, checked)), strict=True))


def low_rank_runner(call: LowRankCall, shape: DecodeShape) -> Runner:
    """Latents and a raw tail."""

    def expected() -> Tensor:
        tail = call.tail
        if tail is not None:
            tail = replace(tail, k=tail.k[:1], v=tail.v[:1], n_valid=tail.n_valid[:1])
        scales = [None if each is None else each[:1] for each in (call.key_scales, call.value_scales)]
        first = replace(
            call,
            q=call.q[:1],
            keys=call.keys[:1],
            values=call.values[:1],
            n_valid=call.n_valid[:1],
            where=first_positions(call.where),
            key_scales=scales[0],
            value_scales=scales[1],
            tail=tail,
        )
        return reference_low_rank_attention(first).out

    rows = len(shape.rows) * shape.capacity
    tail_bytes = 2 * len(shape.rows) * shape.tail_capacity * shape.kv_heads * shape.dim * 2
    size = rows * (call.factors.bytes_per_row + POSITION_BYTES) + tail_bytes
    return Runner(lambda: low_rank_attention(call).out, size, expected if checkable(shape) else None)


def quantized_runner(call: QuantizedRowsCall, shape: DecodeShape) -> Runner:
    """Codes of full rank with the keys' bias apart. There is no tail: new rows are quantized, too."""

    def expected() -> Tensor:
        bias = call.key_bias
        if bias is not None:
            bias = replace(bias, where=first_positions(bias.where))
        first = replace(
            call, q=call.q[:1], k=call.k[:1], v=call.v[:1], n_valid=call.n_valid[:1], key_bias=bias
        )
        return reference_quantized_rows(first).out

    positions = len(shape.rows) * shape.capacity * POSITION_BYTES
    size = 2 * call.k.numel() + positions
    return Runner(lambda: quantized_rows_attention(call).out, size, expected if checkable(shape) else None)


def first_positions(where: CachedPositions) -> CachedPositions:
    return replace(where, positions=where.positions[:1])


def check_runners(runners: dict[str, Runner]) -> dict[str, float]:
    """Largest error of every implementation, as a share of the largest output.

    Raises:
        AssertionError: one is larger than rounding explains.
    """
    errors = {}
    for name, runner in runners.items():
        if runner.expected is None:
            continue
        expected = runner.expected()
        error = float((runner.run()[:1].float() - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCE, f"{name} is {error:.1%} off what PyTorch says"
        errors[name] = error
    return errors
