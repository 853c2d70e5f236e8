# SPDX-License-Identifier: Apache-2.0
"""The C ABI's structures for caches of codes, with the names of ``starkv_kernels.h``."""

from ctypes import Structure, c_int32, c_void_p

QUANTIZED_INPUTS = (
    *("q", "k", "v", "past_k", "past_v", "kv_len", "positions"),
    *("k_scale", "v_scale", "k_bias", "v_bias", "cos_table", "sin_table"),
)
"""Of the operator, in the order of its definition."""
QUANTIZED_OUTPUTS = ("present_k", "present_v", "out")
CODE_ROWS_TENSORS = (
    *("k", "v", "lengths", "positions", "k_scale", "v_scale", "k_bias", "v_bias"),
    *("cos_table", "sin_table", "k_codes", "v_codes"),
)
"""Of rows that become codes, or codes that become rows."""


class QuantizedAttentionShape(Structure):
    """``starkv_quantized_attention_shape``: dimensions of ``QuantizedKVAttention``."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in ("sequences", "query_heads", "kv_heads", "head_dim", "capacity", "table_rows")
        ),
        ("bits", c_int32),
        ("dtype", c_int32),
        ("mrope_section", c_int32 * 3),
    ]


class QuantizedAttentionBuffers(Structure):
    """``starkv_quantized_attention_buffers``: its pointers."""

    _fields_ = [(name, c_void_p) for name in (*QUANTIZED_INPUTS, *QUANTIZED_OUTPUTS)]


class CodeRowsShape(Structure):
    """``starkv_code_rows_shape``: dimensions of a float cache and of a cache of codes, and a slot of it."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in ("layers", "kv_heads", "head_dim", "capacity", "slots", "slot_capacity", "slot")
        ),
        ("table_rows", c_int32),
        ("bits", c_int32),
        ("dtype", c_int32),
        ("mrope_section", c_int32 * 3),
    ]


class CodeRowsBuffers(Structure):
    """``starkv_code_rows_buffers``: its pointers. Only quantizing needs ``wrong_rows``."""

    _fields_ = [(name, c_void_p) for name in (*CODE_ROWS_TENSORS, "wrong_rows")]
