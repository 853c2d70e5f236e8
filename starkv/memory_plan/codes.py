# SPDX-License-Identifier: Apache-2.0
"""Bytes of what an engine that keeps int8 or int4 codes has in device memory for them.

As ``runtime/engines/{device_codes,device_packing,trt_caches}.py`` allocate it. Symbols: L layers, G KV heads,
D head dim, C rows of capacity, P positions, R bytes of a key's codes.
"""

from starkv.kv_packing.positions import COMPONENTS
from starkv.kv_packing.quantized import code_bytes_per_row
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import TextShape
from starkv.runtime.kv.buffers import ROW_STEP, round_up_rows

_WIDE, _NARROW = 4, 2
"""Bytes of a float32 or int32, of a number in the compute dtype."""
_VECTORS, _TABLES = 4, 2
"""Scales and biases of keys and values; cosines and sines."""


def code_bytes(text: TextShape, slots: int, rows: int, bits: Bits) -> int:
    """Bytes of a cache of codes: slots · C · L · (2 · G · R + 12), with C = ``rows`` rounded up to 64."""
    return slots * round_up_rows(rows) * code_bytes_per_row(text, bits)


def packing_bytes(text: TextShape, sessions: int, bits: Bits, position_rows: int) -> int:
    """Bytes that are there as long as the engine is open.

    Each layer's scales and biases (4 · 4 · G · D), the rotary tables (2 · 4 · P · D/2), and what stands for
    the cache that a step does not read.

    Args:
        text: sizes of the decoder.
        sessions: that the engine is built for.
        bits: of a code.
        position_rows: P.
    """
    scales = text.layers * _vector_bytes(text)
    return scales + _table_bytes(text, position_rows) + _stand_in_bytes(text, sessions, bits)


def _stand_in_bytes(text: TextShape, sessions: int, bits: Bits) -> int:
    """The fewest rows that a plan takes, shared by all layers, keys and values: 64 of floats, 1 of codes."""
    row = text.kv_heads * text.head_dim
    floats, codes, position = ROW_STEP * row * _NARROW, row * bits // 8, COMPONENTS * _WIDE
    return sessions * (floats + codes + position) + _vector_bytes(text) + _table_bytes(text, 1)


def _vector_bytes(text: TextShape) -> int:
    return _VECTORS * text.kv_heads * text.head_dim * _WIDE


def _table_bytes(text: TextShape, positions: int) -> int:
    return _TABLES * positions * text.head_dim // 2 * _WIDE
