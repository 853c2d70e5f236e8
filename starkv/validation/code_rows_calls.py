# SPDX-License-Identifier: Apache-2.0
"""Random rows to quantize and codes to dequantize, with positions as screenshots and text have them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kernels.quantized_attention_reference import rotated_to
from starkv.validation.quantized_calls import QuantizedSize, make_quantized_call


@dataclass(frozen=True)
class CodeRowsSize:
    """Dimensions of a call."""

    lengths: tuple[int, ...]
    """Rows of each layer."""
    capacity: int
    """Rows of the float cache."""
    slot_capacity: int
    bits: int = 8
    kv_heads: int = 4
    head_dim: int = 128
    slots: int = 3
    slot: int = 1
    table_rows: int = 600
    largest_bias: float = 30.0
    """Of a few columns; the others' is about 1."""


def make_code_rows_call(
    size: CodeRowsSize, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> CodeRowsCall:
    """A random call: rows to quantize, and codes of other rows to dequantize. Each layer has scales, biases
    and codes of its own. Rows behind a layer's length are NaN and positions that nobody may read senseless.
    """
    random = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    of_layers = [
        make_quantized_call(_of_layer(size, rows), dtype, device, seed=seed * len(size.lengths) + layer)
        for layer, rows in enumerate(size.lengths)
    ]

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(layer, name) for layer in of_layers])

    layers, groups, dim = len(size.lengths), size.kv_heads, size.head_dim
    k_bias, v_bias = stacked("k_bias").view(layers, groups, dim), stacked("v_bias").view(layers, groups, dim)
    k_bias[..., :: dim // 4] = size.largest_bias * k_bias[..., :: dim // 4].sign()
    v_bias[..., :: dim // 4] = size.largest_bias * v_bias[..., :: dim // 4].sign()
    positions = torch.full((layers, size.slots, size.slot_capacity, 3), -(1 << 30), device=device)
    floats = (layers, 1, groups, size.capacity, dim)
    k, v = torch.full(floats, torch.nan, device=device), torch.full(floats, torch.nan, device=device)
    first = of_layers[0]
    for layer, rows in enumerate(size.lengths):
        where = of_layers[layer].positions[0, :rows]
        positions[layer, size.slot, :rows] = where
        rotated = rotated_to(k_bias[layer], where, first.cos_table, first.sin_table, first.mrope_section)
        k[layer, 0, :, :rows] = 2 * draw(groups, rows, dim) + rotated.transpose(0, 1)
        v[layer, 0, :, :rows] = 2 * draw(groups, rows, dim) + v_bias[layer][:, None]
    codes = (layers, size.slots, groups, size.slot_capacity, -1)
    return CodeRowsCall(
        k=k.to(dtype),
        v=v.to(dtype),
        lengths=torch.tensor(size.lengths, dtype=torch.int32, device=device),
        positions=positions.to(torch.int32),
        k_scale=stacked("k_scale"),
        v_scale=stacked("v_scale"),
        k_bias=k_bias.view(layers, -1),
        v_bias=v_bias.view(layers, -1),
        cos_table=first.cos_table,
        sin_table=first.sin_table,
        k_codes=stacked("past_k").view(codes),
        v_codes=stacked("past_v").view(codes),
        slot=size.slot,
        mrope_section=first.mrope_section,
    )


def _of_layer(size: CodeRowsSize, rows: int) -> QuantizedSize:
    """One layer as attention has it: a sequence for each slot, the last of its rows the newest."""
    held = max(rows - 1, 0)
    return QuantizedSize(
        held=(held,) * size.slots,
        capacity=size.slot_capacity,
        bits=size.bits,
        query_heads=size.kv_heads,
        kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        table_rows=size.table_rows,
    )
