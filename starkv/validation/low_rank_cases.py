# SPDX-License-Identifier: Apache-2.0
"""Random steps of low-rank and of quantized decode attention, for tests and benchmarks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.kernels.cached_positions import CachedPositions
from starkv.kernels.low_rank_call import LowRankCall, RawTail
from starkv.kernels.low_rank_factors import LatentForm, LowRankFactors
from starkv.kernels.quantized_rows_call import KeyBias, QuantizedRowsCall

ROPE_BASE = 1e6


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of one layer's decode step."""

    heads: int = 28
    """Query heads."""
    kv_heads: int = 4
    dim: int = 128
    capacity: int = 128
    rows: tuple[int, ...] = (128,)
    """That each sequence holds."""
    sections: tuple[int, int, int] = (16, 24, 24)
    key_ranks: tuple[int, ...] = (32, 32, 32, 32)
    """Of the key factors; fewer of them than KV heads share one."""
    value_rank: int = 154
    tail_capacity: int = 0
    tail_rows: tuple[int, ...] = ()
    """Of each sequence; as many as ``rows``, or none without a tail."""
    frame: tuple[int, int] = (39, 69)
    """Cells of a screenshot: rows of the cache are cells of consecutive ones. (1, 1) makes text of them."""


def screen_positions(rows: int, frame: tuple[int, int]) -> Tensor:
    """``[rows, 3]`` i32: positions of consecutive screenshots' cells, each begun behind the largest so
    far."""
    down, across = frame
    cell = torch.arange(rows)
    start = cell // (down * across) * max(frame)
    place = cell % (down * across)
    return torch.stack((start, start + place // across, start + place % across), -1).to(torch.int32)


def cached_positions(shape: DecodeShape, device: torch.device) -> CachedPositions:
    """Positions of all rows, the same in every sequence, and tables just long enough for them."""
    positions = screen_positions(shape.capacity, shape.frame).to(device)
    pairs = shape.dim // 2
    frequencies = ROPE_BASE ** -(torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    table = torch.arange(int(positions.max()) + 1, device=device)[:, None] * frequencies
    return CachedPositions(
        positions=positions.expand(len(shape.rows), -1, -1).contiguous(),
        cosines=table.cos().float(),
        sines=table.sin().float(),
        sections=shape.sections,
    )


def low_rank_case(
    shape: DecodeShape, form: LatentForm, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> LowRankCall:
    """Random latents, as codes or floats, of keys and values about as large as real ones."""
    torch.manual_seed(seed)
    group_heads = shape.kv_heads // len(shape.key_ranks)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device)

    factors = LowRankFactors.of(
        form,
        [(random(group_heads * shape.dim, rank) / rank**0.5).to(dtype) for rank in shape.key_ranks],
        (random(shape.kv_heads * shape.dim, shape.value_rank) / shape.value_rank**0.5).to(dtype),
        2 * random(shape.kv_heads, shape.dim),
        random(shape.kv_heads, shape.dim),
    )
    batch, capacity = len(shape.rows), shape.capacity

    def latents(row: int) -> Tensor:
        size = (batch, capacity, row)
        if form == "float":
            return torch.randn(size, device=device, dtype=dtype)
        if form == "int8":
            return torch.randint(-128, 128, size, device=device, dtype=torch.int8)
        return torch.randint(0, 256, size, device=device, dtype=torch.uint8)

    def scales(*size: int) -> Tensor | None:
        if form == "float":
            return None
        largest = {"int8": 128, "int4": 8}[form]
        return ((1 + torch.rand(batch, capacity, *size, 2, device=device)) / largest).bfloat16()

    return LowRankCall(
        q=random(batch, shape.heads, shape.dim).to(dtype),
        keys=latents(factors.key_row),
        values=latents(factors.value_row),
        n_valid=torch.tensor(shape.rows, dtype=torch.int32, device=device),
        where=cached_positions(shape, device),
        factors=factors,
        key_scales=scales(len(shape.key_ranks)),
        value_scales=scales(),
        tail=random_tail(shape, dtype, device),
    )


def random_tail(shape: DecodeShape, dtype: torch.dtype, device: torch.device) -> RawTail | None:
    """The newest rows, if the shape has some."""
    if not shape.tail_capacity:
        return None
    size = (len(shape.rows), shape.kv_heads, shape.tail_capacity, shape.dim)
    return RawTail(
        k=torch.randn(size, device=device, dtype=dtype),
        v=torch.randn(size, device=device, dtype=dtype),
        n_valid=torch.tensor(shape.tail_rows, dtype=torch.int32, device=device),
    )


def quantized_case(
    shape: DecodeShape, form: LatentForm, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> QuantizedRowsCall:
    """Random codes with scales per channel, which the keys' rotary pairs share, and biases.

    Args:
        shape: ranks and the tail count nothing.
        form: ``int8`` or ``int4``.
        dtype: of the query.
        device: of all tensors.
        seed: of the random numbers.
    """
    torch.manual_seed(seed)
    batch, channels = len(shape.rows), (shape.kv_heads, shape.dim)
    size = (batch, shape.kv_heads, shape.capacity)

    def codes() -> Tensor:
        if form == "int8":
            return torch.randint(-128, 128, (*size, shape.dim), device=device, dtype=torch.int8)
        return torch.randint(0, 256, (*size, shape.dim // 2), device=device, dtype=torch.uint8)

    def scales() -> Tensor:
        return (1 + torch.rand(channels, device=device)) / {"int8": 128, "int4": 8}[form]

    return QuantizedRowsCall(
        q=torch.randn(batch, shape.heads, shape.dim, device=device).to(dtype),
        k=codes(),
        v=codes(),
        k_scales=scales()[:, : shape.dim // 2].repeat(1, 2),
        v_scales=scales(),
        n_valid=torch.tensor(shape.rows, dtype=torch.int32, device=device),
        key_bias=KeyBias(2 * torch.randn(channels, device=device), cached_positions(shape, device)),
        value_bias=torch.randn(channels, device=device),
    )
