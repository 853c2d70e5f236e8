# SPDX-License-Identifier: Apache-2.0
"""Quantizing and dequantizing rows by the numpy of the runtime, which needs pydantic and ml_dtypes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.quantized_rows import QuantizedRows, RowQuantization
from starkv.lowrank.rotary import Rotary
from starkv.manifest import TextShape
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.quantized import QuantizedCodec


class TableRotary:
    """Stands in for a ``Rotary``: cosines and sines are the kernels' own, in float32."""

    def __init__(self, call: CodeRowsCall) -> None:
        self.component = np.repeat(np.arange(3), call.mrope_section)
        self.of_table = [table.cpu().numpy() for table in (call.cos_table, call.sin_table)]

    def tables(self, positions: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        rows, pairs = positions[..., self.component], np.arange(len(self.component))
        return tuple(table[rows, pairs] for table in self.of_table)


def exact_rotary(call: CodeRowsCall, theta: float) -> Rotary:
    """The processor's, in float64."""
    half = call.k.shape[4] // 2
    return Rotary(theta ** -(np.arange(half) / half), call.mrope_section)


def quantization(
    call: CodeRowsCall, layer: int, bias_type: type[np.floating] = np.float32
) -> RowQuantization:
    """A layer's scales and biases; the runtime's biases are float64."""
    groups = call.k.shape[2]
    k_scale, v_scale, k_bias, v_bias = (
        parameter[layer].view(groups, -1).cpu().numpy()
        for parameter in (call.k_scale, call.v_scale, call.k_bias, call.v_bias)
    )
    bits = 8 if call.bits == 8 else 4
    return RowQuantization(bits, k_scale, v_scale, k_bias.astype(bias_type), v_bias.astype(bias_type))


def positions_of(call: CodeRowsCall, layer: int) -> NDArray[np.int32]:
    """``[rows, 3]``."""
    positions: NDArray[np.int32] = call.positions[layer, call.slot, : int(call.lengths[layer])].cpu().numpy()
    return positions


def quantized_rows(
    call: CodeRowsCall, layer: int, rotary: Any, layer_quantization: RowQuantization
) -> QuantizedRows:
    """A layer's rows, as ``QuantizedKv.pack`` has them."""
    rows = int(call.lengths[layer])
    keys, values = (cache[layer, 0, :, :rows].transpose(0, 1).cpu().numpy() for cache in (call.k, call.v))
    return layer_quantization.quantize(keys, values, positions_of(call, layer), rotary)


def codes_of(call: CodeRowsCall, layer: int) -> QuantizedRows:
    """What a call holds in its slot."""
    rows = int(call.lengths[layer])
    keys, values = (
        codes[layer, call.slot, :, :rows].transpose(0, 1).cpu().numpy()
        for codes in (call.k_codes, call.v_codes)
    )
    return QuantizedRows(keys, values, positions_of(call, layer))


def unpacked(call: CodeRowsCall) -> ParkedRows:
    """All layers' rows by ``QuantizedCodec.unpack``."""
    layers, _, groups, _, dim = call.k.shape
    quantizations = tuple(quantization(call, layer) for layer in range(layers))
    text = TextShape(
        layers=layers,
        hidden=groups * dim,
        intermediate=8,
        heads=groups,
        kv_heads=groups,
        head_dim=dim,
        vocab=8,
        rope_theta=1e6,
        mrope_section=list(call.mrope_section),
        max_positions=call.cos_table.shape[0],
        tied_embedding=True,
    )
    rotary: Any = TableRotary(call)
    codec = QuantizedCodec(QuantizedPacking(quantizations[0].bits, quantizations), rotary, text)
    codes = [codes_of(call, layer) for layer in range(layers)]
    parked = ParkedRows(
        tuple(rows.keys.transpose(1, 0, 2) for rows in codes),
        tuple(rows.values.transpose(1, 0, 2) for rows in codes),
        tuple(np.zeros((len(rows.positions), 4), np.int32) for rows in codes),
        tuple(rows.positions for rows in codes),
    )
    return codec.unpack(parked)
