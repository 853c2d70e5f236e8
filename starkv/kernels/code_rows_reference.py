# SPDX-License-Identifier: Apache-2.0
"""The reference of quantizing and dequantizing rows in PyTorch, to the bit what the kernels give.

The numpy of ``starkv/lowrank/quantized_rows.py`` in float32 is the same.
"""

import torch
from torch import Tensor

from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kernels.quantized_attention_reference import decode, encode, rotated_to


def reference_quantize_rows(call: CodeRowsCall) -> tuple[Tensor, Tensor, Tensor]:
    """``k_codes``, ``v_codes`` as they are afterwards, and ``wrong_rows [L]`` i32."""
    k_codes, v_codes = call.k_codes.clone(), call.v_codes.clone()
    wrong_rows = torch.zeros_like(call.lengths)
    for layer, rows in enumerate(call.lengths.tolist()):
        if not _makes_sense(call, rows):
            wrong_rows[layer] = -1
            continue
        placed = _placed(call, layer, rows)
        keys, values = (cache[layer, 0, :, :rows].float() for cache in (call.k, call.v))
        finite = (keys.isfinite() & values.isfinite()).all(-1).all(0)
        wrong_rows[layer] = int((~(placed & finite)).sum())
        scales, biases = _parameters(call, layer, rows, placed)
        for codes, exact, scale, bias in zip((k_codes, v_codes), (keys, values), scales, biases, strict=True):
            # As the kernels have it, the code of what is no number is the lowest.
            numbers = (exact - bias).nan_to_num(-torch.inf, torch.inf, -torch.inf)
            held = codes[layer, call.slot, :, :rows]
            held[:, placed] = encode(numbers, scale, call.bits)[:, placed]
    return k_codes, v_codes, wrong_rows


def reference_dequantize_rows(call: CodeRowsCall) -> tuple[Tensor, Tensor]:
    """``k`` and ``v`` as they are afterwards."""
    k, v = call.k.clone(), call.v.clone()
    for layer, rows in enumerate(call.lengths.tolist()):
        if not _makes_sense(call, rows):
            continue
        placed = _placed(call, layer, rows)
        scales, biases = _parameters(call, layer, rows, placed)
        caches = zip((k, v), (call.k_codes, call.v_codes), scales, biases, strict=True)
        for floats, codes, scale, bias in caches:
            numbers = decode(codes[layer, call.slot, :, :rows]).float() * scale + bias
            floats[layer, 0, :, :rows] = numbers.to(call.k.dtype)
        k[layer, 0, :, :rows][:, ~placed] = torch.nan
    return k, v


def _makes_sense(call: CodeRowsCall, rows: int) -> bool:
    return bool(0 <= rows <= min(call.k.shape[3], call.k_codes.shape[3]))


def _placed(call: CodeRowsCall, layer: int, rows: int) -> Tensor:
    """Whether the tables have each row's position."""
    positions = call.positions[layer, call.slot, :rows]
    return ((positions >= 0) & (positions < call.cos_table.shape[0])).all(-1)


def _parameters(
    call: CodeRowsCall, layer: int, rows: int, placed: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scales ``[G, 1, D]`` of keys and values, and biases: ``[G, rows, D]`` and ``[G, 1, D]``."""
    groups, dim = call.k.shape[2], call.k.shape[4]
    k_scale, v_scale, k_bias, v_bias = (
        parameter[layer].view(groups, dim)
        for parameter in (call.k_scale, call.v_scale, call.k_bias, call.v_bias)
    )
    positions = call.positions[layer, call.slot, :rows] * placed[:, None]
    rotated = rotated_to(k_bias, positions, call.cos_table, call.sin_table, call.mrope_section)
    return (k_scale[:, None], v_scale[:, None]), (rotated.transpose(0, 1), v_bias[:, None])
