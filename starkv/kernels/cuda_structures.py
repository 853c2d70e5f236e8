# SPDX-License-Identifier: Apache-2.0
"""The C ABI of ``plugins_trt/include/starkv_kernels.h`` as ctypes structures, filled from tensors."""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_int, c_int32, c_size_t, c_void_p

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.kernels.attention_call import AttentionCall
from starkv.kernels.compress_call import CompressCall, CompressResult

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POOLINGS = {"avgpool": 0, "maxpool": 1}
_STATE = ("mi_ema", "pattern_ema", "temperature")
_TENSORS = ("k", "v", "q_window", "hidden_norm", "kv_len", "row_meta", "frame", "parameters", "limits")
_INPUTS = (*_TENSORS, *_STATE, "slot", "dst_k", "dst_v", "dst_meta")
_OUTPUTS = ("new_len", "rows", "scores", "stages")


def dtype_code(dtype: torch.dtype) -> int:
    """``starkv_dtype`` of a PyTorch type.

    Raises:
        UsageError: the kernels don't know it.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"the kernels take float32, float16 and bfloat16, not {dtype}")
    return _DTYPES[dtype]


class CompressShape(Structure):
    """``starkv_compress_shape``."""

    _fields_ = [
        (name, c_int32)
        for name in (
            "layers",
            "sequences",
            "kv_heads",
            "query_heads",
            "window",
            "head_dim",
            "capacity",
            "slots",
            "slot_capacity",
            "pattern_capacity",
            "dtype",
            "pooling",
            "pooling_kernel",
        )
    ]

    @classmethod
    def of(cls, call: CompressCall) -> "CompressShape":
        """Dimensions of a call."""
        layers, batch, groups, capacity, dim = call.k.shape
        heads, window = call.q_window.shape[2:4]
        slots, _, rows = call.dst_k.shape[1:4]
        pattern = call.pattern_ema.shape[-1]
        pooling = _POOLINGS[call.pooling], call.pooling_kernel
        sizes = (layers, batch, groups, heads, window, dim, capacity, slots, rows, pattern)
        return cls(*sizes, dtype_code(call.k.dtype), *pooling)


class CompressBuffers(Structure):
    """``starkv_compress_buffers``."""

    _fields_ = [(name, c_void_p) for name in (*_INPUTS, *_OUTPUTS, *(f"new_{name}" for name in _STATE))]

    @classmethod
    def of(cls, call: CompressCall, result: CompressResult) -> "CompressBuffers":
        """Pointers of a call's tensors, which must outlive it."""
        pointers = {name: getattr(call, name).data_ptr() for name in _INPUTS}
        pointers |= {name: getattr(result, name).data_ptr() for name in _OUTPUTS}
        pointers |= {f"new_{name}": getattr(result, name).data_ptr() for name in _STATE}
        return cls(**pointers)


class AttentionShape(Structure):
    """``starkv_attention_shape``."""

    _fields_ = [
        (name, c_int32)
        for name in (
            "sequences",
            "new_tokens",
            "query_heads",
            "kv_heads",
            "head_dim",
            "capacity",
            "dtype",
        )
    ]

    @classmethod
    def of(cls, call: AttentionCall) -> "AttentionShape":
        """Dimensions of a call."""
        batch, groups, capacity, dim = call.past_k.shape
        return cls(batch, call.q.shape[1], call.heads, groups, dim, capacity, dtype_code(call.q.dtype))


class AttentionBuffers(Structure):
    """``starkv_attention_buffers``."""

    _fields_ = [
        (name, c_void_p)
        for name in ("q", "k", "v", "past_k", "past_v", "kv_len", "present_k", "present_v", "out")
    ]

    @classmethod
    def of(cls, call: AttentionCall, present_k: Tensor, present_v: Tensor, out: Tensor) -> "AttentionBuffers":
        """Pointers of a call's tensors, which must outlive it."""
        inputs = (call.q, call.k, call.v, call.past_k, call.past_v, call.kv_len)
        return cls(*(tensor.data_ptr() for tensor in (*inputs, present_k, present_v, out)))


def declare(library: ctypes.CDLL) -> None:
    """Declare the functions' types.

    Raises:
        AttributeError: the library lacks one.
    """
    pointer, integer = c_void_p, c_int32
    for name, shape, buffers in (
        ("starkv_compress", CompressShape, CompressBuffers),
        ("starkv_attention", AttentionShape, AttentionBuffers),
    ):
        getattr(library, name).argtypes = [POINTER(shape), POINTER(buffers), pointer, c_size_t, pointer]
        getattr(library, f"{name}_workspace").argtypes = [POINTER(shape), POINTER(c_size_t)]
    library.starkv_embedding_gather.argtypes = [pointer] * 3 + [integer] * 4 + [pointer]
    library.starkv_argmax.argtypes = [pointer] * 2 + [integer] * 2 + [pointer]
    library.starkv_sample_top_p.argtypes = [pointer] * 5 + [integer] * 2 + [pointer]
    for name in ("starkv_status_name", "starkv_status_message"):
        getattr(library, name).argtypes = [c_int]
        getattr(library, name).restype = c_char_p
    library.starkv_device_kind.restype = c_char_p
