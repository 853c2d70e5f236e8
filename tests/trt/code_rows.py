# SPDX-License-Identifier: Apache-2.0
"""The kernels that turn rows into codes and back, on the fake card: what their header says, in PyTorch."""

from ctypes import Array as CArray
from typing import Any

import ml_dtypes
import numpy as np
import torch
from fake_cuda import FakeCuda
from fake_tensorrt.context import view
from fake_tensorrt.plugin_nodes import tensor_of
from torch import Tensor

from starkv.kernels.c_abi import BFLOAT16, FLOAT16, FLOAT32
from starkv.kernels.c_abi_quantized import CodeRowsBuffers, CodeRowsShape
from starkv.kernels.quantized_attention_reference import decode, encode

_DTYPES: dict[int, Any] = {FLOAT32: np.float32, FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}


def submit_code_rows(
    cuda: FakeCuda, quantizes: bool, shape: CodeRowsShape, buffers: CodeRowsBuffers, stream: int
) -> None:
    """Enqueue ``starkv_quantize_rows`` or ``starkv_dequantize_rows``."""
    # Structures are read when the call is made, memory when it runs.
    at = {name: int(getattr(buffers, name) or 0) for name, _ in buffers._fields_}
    s = CodeRowsShape.from_buffer_copy(shape)
    what = "starkv_quantize_rows" if quantizes else "starkv_dequantize_rows"
    cuda.submit(stream, lambda: _run(quantizes, s, at), what)


def _run(quantizes: bool, s: CodeRowsShape, at: dict[str, int]) -> None:
    floats = (s.layers, s.kv_heads, s.capacity, s.head_dim)
    width = s.head_dim * s.bits // 8
    codes = (s.layers, s.slots, s.kv_heads, s.slot_capacity, width)
    kind = np.int8 if s.bits == 8 else np.uint8

    def tensor(name: str, size: tuple[int, ...], dtype: Any) -> Tensor:
        return tensor_of(view(at[name], size, dtype, name))

    caches = [tensor(name, floats, _DTYPES[s.dtype]) for name in "kv"]
    coded = [tensor(f"{name}_codes", codes, kind)[:, s.slot] for name in "kv"]
    places = tensor("positions", (s.layers, s.slots, s.slot_capacity, 3), np.int32)[:, s.slot]
    vectors = [
        tensor(name, (s.layers, s.kv_heads, s.head_dim), np.float32)
        for name in ("k_scale", "v_scale", "k_bias", "v_bias")
    ]
    tables = [
        tensor(name, (s.table_rows, s.head_dim // 2), np.float32) for name in ("cos_table", "sin_table")
    ]
    for layer, rows in enumerate(tensor("lengths", (s.layers,), np.int32).tolist()):
        own = places[layer, :rows]
        known = ((own >= 0) & (own < s.table_rows)).all(-1)
        k_scale, v_scale, k_bias, v_bias = (vector[layer, :, None] for vector in vectors)
        shift = _rotated(k_bias, own.clamp(0, s.table_rows - 1), tables, s.mrope_section)
        keys, values = (cache[layer, :, :rows] for cache in caches)
        if not quantizes:
            keys.copy_((decode(coded[0][layer, :, :rows]).float() * k_scale + shift).to(keys.dtype))
            values.copy_((decode(coded[1][layer, :, :rows]).float() * v_scale + v_bias).to(values.dtype))
            continue
        finite = (keys.isfinite() & values.isfinite()).all(-1).all(0)
        tensor("wrong_rows", (s.layers,), np.int32)[layer] = int((~(finite & known)).sum())
        coded[0][layer, :, :rows] = encode(keys.float() - shift, k_scale, s.bits)
        coded[1][layer, :, :rows] = encode(values.float() - v_bias, v_scale, s.bits)


def _rotated(bias: Tensor, places: Tensor, tables: list[Tensor], sections: CArray[Any]) -> Tensor:
    """The bias ``[G, 1, D]`` rotated to each row's position: ``[G, rows, D]``."""
    component = torch.repeat_interleave(torch.arange(3), torch.tensor(list(sections)))
    cosine, sine = (table[places[:, component].long(), torch.arange(len(component))] for table in tables)
    first, second = bias.split(len(component), -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
