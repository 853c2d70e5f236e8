# SPDX-License-Identifier: Apache-2.0
"""Lengthen a saved sequence of llama.cpp: a cache of 13,000 rows without the minutes of prefilling them.

The layout is that of ``llama_state_seq_get_data`` with flash attention on, little-endian and without padding:

    u32 magic                                                   i32 sequence, 0
    u32 streams, 1                                              u32 rows
    a row:    i32 position, u32 sequences, 1, i32 sequence
    u32 values are transposed, 0                                u32 layers
    a layer:  i32 type of keys, u64 bytes of a row, rows        for all layers, then the same for values

It is no promise of llama.cpp's, so every field is checked.
"""

import struct

import numpy as np

_MAGIC = 0xAF143CD8
_HEADER = struct.Struct("<IiII")
_ROW = struct.Struct("<iIi")
_PAIR = struct.Struct("<II")
_LAYER = struct.Struct("<iQ")


class UnknownStateError(Exception):
    """The state is laid out in another way than this module knows."""


def lengthen_state(state: bytes, rows: int) -> bytearray:
    """Repeat the rows of a sequence until it has ``rows`` of them, at positions 0, 1, 2….

    Args:
        state: of a sequence with a few rows.
        rows: wanted.

    Raises:
        UnknownStateError: ``state`` is laid out differently.
    """
    magic, sequence, streams, held = _HEADER.unpack_from(state, 0)
    if magic != _MAGIC or sequence or streams != 1 or not 0 < held <= rows:
        raise UnknownStateError(f"magic {magic:#x}, sequence {sequence}, {streams} streams, {held} rows")
    offset = _HEADER.size
    for position in range(held):
        if _ROW.unpack_from(state, offset) != (position, 1, 0):
            raise UnknownStateError(f"row {position} is {_ROW.unpack_from(state, offset)}")
        offset += _ROW.size
    transposed, layers = _PAIR.unpack_from(state, offset)
    if transposed:
        raise UnknownStateError("values are transposed; switch flash attention on")
    offset += _PAIR.size

    longer = bytearray(_HEADER.pack(_MAGIC, 0, 1, rows))
    for position in range(rows):
        longer += _ROW.pack(position, 1, 0)
    longer += _PAIR.pack(0, layers)
    for _ in range(2 * layers):
        _, row_bytes = _LAYER.unpack_from(state, offset)
        longer += state[offset : offset + _LAYER.size]
        offset += _LAYER.size
        block = np.frombuffer(state, np.uint8, held * row_bytes, offset).reshape(held, row_bytes)
        offset += held * row_bytes
        longer += np.resize(block, (rows, row_bytes)).tobytes()
    if offset != len(state):
        raise UnknownStateError(f"{len(state) - offset} bytes are left over")
    return longer
