# SPDX-License-Identifier: Apache-2.0
"""The kernels that turn rows into codes and back, on the fake card: their reference, on a stream."""

from typing import Any

import ml_dtypes
import numpy as np
from fake_cuda import FakeCuda
from fake_tensorrt.context import view
from fake_tensorrt.plugin_nodes import tensor_of
from torch import Tensor

from starkv.kernels.c_abi import BFLOAT16, FLOAT16, FLOAT32
from starkv.kernels.c_abi_quantized import CodeRowsBuffers, CodeRowsShape
from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kernels.code_rows_reference import reference_dequantize_rows, reference_quantize_rows

_DTYPES: dict[int, Any] = {FLOAT32: np.float32, FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}


def submit_code_rows(
    cuda: FakeCuda, quantizes: bool, shape: CodeRowsShape, buffers: CodeRowsBuffers, stream: int
) -> None:
    """Enqueue ``starkv_quantize_rows`` or ``starkv_dequantize_rows``."""
    # Structures are read when the call is made, memory when it runs.
    addresses = {name: int(getattr(buffers, name) or 0) for name, _ in buffers._fields_}
    sizes = CodeRowsShape.from_buffer_copy(shape)

    def run() -> None:
        call = _call(sizes, addresses)
        call.check()
        if quantizes:
            results = reference_quantize_rows(call)
            wrong = _tensor(addresses, "wrong_rows", (sizes.layers,), np.int32)
            targets = (call.k_codes, call.v_codes, wrong)
        else:
            results, targets = reference_dequantize_rows(call), (call.k, call.v)
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)

    cuda.submit(stream, run, "starkv_quantize_rows" if quantizes else "starkv_dequantize_rows")


def _call(s: CodeRowsShape, addresses: dict[str, int]) -> CodeRowsCall:
    width, parameters = s.head_dim * s.bits // 8, (s.layers, s.kv_heads * s.head_dim)
    layout: dict[str, tuple[tuple[int, ...], Any]] = {
        **dict.fromkeys("kv", ((s.layers, 1, s.kv_heads, s.capacity, s.head_dim), _DTYPES[s.dtype])),
        "lengths": ((s.layers,), np.int32),
        "positions": ((s.layers, s.slots, s.slot_capacity, 3), np.int32),
        **dict.fromkeys(("k_scale", "v_scale", "k_bias", "v_bias"), (parameters, np.float32)),
        **dict.fromkeys(("cos_table", "sin_table"), ((s.table_rows, s.head_dim // 2), np.float32)),
        **dict.fromkeys(
            ("k_codes", "v_codes"),
            (
                (s.layers, s.slots, s.kv_heads, s.slot_capacity, width),
                np.int8 if s.bits == 8 else np.uint8,
            ),
        ),
    }
    tensors = {name: _tensor(addresses, name, *described) for name, described in layout.items()}
    t, h, w = s.mrope_section
    return CodeRowsCall(**tensors, slot=s.slot, mrope_section=(t, h, w))


def _tensor(addresses: dict[str, int], name: str, shape: tuple[int, ...], dtype: Any) -> Tensor:
    return tensor_of(view(addresses[name], shape, dtype, name))
