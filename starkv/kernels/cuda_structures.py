# SPDX-License-Identifier: Apache-2.0
"""The C ABI's structures of calls on PyTorch's tensors."""

import torch
from torch import Tensor

from starkv.kernels.c_abi import (
    BFLOAT16,
    COMPRESS_INPUTS,
    COMPRESS_OUTPUTS,
    COMPRESS_STATE,
    FLOAT16,
    FLOAT32,
    POOLINGS,
    CompressBuffers,
    CompressShape,
)
from starkv.kernels.c_abi_quantized import (
    CODE_ROWS_TENSORS,
    CodeRowsBuffers,
    CodeRowsShape,
    QuantizedAttentionShape,
)
from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.quantized_attention_call import QuantizedAttentionCall

DTYPES = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
"""``starkv_dtype``."""


def pointers_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Where each tensor's memory starts; the tensors must outlive it."""
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def compress_shape(call: CompressCall) -> CompressShape:
    """Dimensions of a call."""
    layers, batch, groups, capacity, dim = call.k.shape
    return CompressShape(
        layers=layers,
        sequences=batch,
        kv_heads=groups,
        query_heads=call.q_window.shape[2],
        window=call.window,
        head_dim=dim,
        capacity=capacity,
        slots=call.dst_k.shape[1],
        slot_capacity=call.dst_k.shape[3],
        pattern_capacity=call.pattern_ema.shape[-1],
        dtype=DTYPES[call.k.dtype],
        pooling=POOLINGS[call.pooling],
        pooling_kernel=call.pooling_kernel,
    )


def compress_buffers(call: CompressCall, result: CompressResult) -> CompressBuffers:
    """Pointers of a call's tensors, which must outlive it."""
    tensors = {name: getattr(call, name) for name in COMPRESS_INPUTS}
    tensors |= {name: getattr(result, name) for name in COMPRESS_OUTPUTS}
    tensors |= {f"new_{name}": getattr(result, name) for name in COMPRESS_STATE}
    return CompressBuffers(**pointers_of(tensors))


def quantized_attention_shape(call: QuantizedAttentionCall) -> QuantizedAttentionShape:
    """Dimensions of a call."""
    batch, groups, capacity, _ = call.past_k.shape
    return QuantizedAttentionShape(
        sequences=batch,
        query_heads=call.heads,
        kv_heads=groups,
        head_dim=call.head_dim,
        capacity=capacity,
        table_rows=call.cos_table.shape[0],
        bits=call.bits,
        dtype=DTYPES[call.q.dtype],
        mrope_section=call.mrope_section,
    )


def code_rows_shape(call: CodeRowsCall) -> CodeRowsShape:
    """Dimensions of a call."""
    layers, _, groups, capacity, dim = call.k.shape
    return CodeRowsShape(
        layers=layers,
        kv_heads=groups,
        head_dim=dim,
        capacity=capacity,
        slots=call.k_codes.shape[1],
        slot_capacity=call.k_codes.shape[3],
        slot=call.slot,
        table_rows=call.cos_table.shape[0],
        bits=call.bits,
        dtype=DTYPES[call.k.dtype],
        mrope_section=call.mrope_section,
    )


def code_rows_buffers(call: CodeRowsCall, wrong_rows: Tensor | None = None) -> CodeRowsBuffers:
    """Pointers of a call's tensors, which must outlive it."""
    tensors = {name: getattr(call, name) for name in CODE_ROWS_TENSORS}
    if wrong_rows is not None:
        tensors["wrong_rows"] = wrong_rows
    return CodeRowsBuffers(**pointers_of(tensors))
