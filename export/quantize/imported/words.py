# SPDX-License-Identifier: Apache-2.0
"""Integers of 4 or 8 bits packed into 32-bit words, the first one in the lowest bits.

All formats store a signed code c as c + 8 (4 bits) or c + 128 (8 bits), "offset binary". Here it becomes
signed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from starkv.export.quantize.columns import Bits
from starkv.export.stored_tensor import StoredTensor

_ROWS_AT_ONCE = 256


def fields_per_word(bits: Bits) -> int:
    """Number of integers in a word."""
    return 32 // bits


def words_for(count: int, bits: Bits) -> int:
    """Number of words that ``count`` integers take, the last one padded."""
    return -(-count // fields_per_word(bits))


def unpack_down(words: npt.NDArray[Any], bits: Bits) -> npt.NDArray[np.int8]:
    """Unpack words [R,n], packed along the first axis, to signed codes [R·fields,n]."""
    fields = fields_per_word(bits)
    octets = _octets(words).reshape(*words.shape, 4)
    codes = np.empty((words.shape[0], fields, words.shape[1]), np.int8)
    for field in range(fields):
        _extract(octets[..., field * bits // 8], field, bits, codes[:, field])
    return codes.reshape(-1, words.shape[1])


def unpack_across(words: npt.NDArray[Any], bits: Bits) -> npt.NDArray[np.int8]:
    """Unpack words [n,W], packed along the last axis, to signed codes [n,W·fields]."""
    octets = _octets(words).reshape(len(words), -1)
    codes = np.empty((len(words), words.shape[1] * fields_per_word(bits)), np.int8)
    fields_per_octet = 8 // bits
    for field in range(fields_per_octet):
        _extract(octets, field, bits, codes[:, field::fields_per_octet])
    return codes


def read_columns_down(tensor: StoredTensor, bits: Bits, start: int, stop: int) -> npt.NDArray[np.int8]:
    """Unpack the columns ``start … stop-1`` of a tensor [R,N], packed along R: [R·fields, stop-start]."""
    fields = fields_per_word(bits)
    codes = np.empty((tensor.shape[0] * fields, stop - start), np.int8)
    for row, words in tensor.column_blocks(start, stop):
        codes[row * fields : (row + len(words)) * fields] = unpack_down(words, bits)
    return codes


def read_columns_across(
    tensor: StoredTensor,
    bits: Bits,
    start: int,
    stop: int,
    arrange: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None = None,
) -> npt.NDArray[np.int8]:
    """Unpack the columns ``start … stop-1`` of a tensor [R,W], packed along W: [R, stop-start].

    ``arrange`` puts the fields of words into order first.
    """
    fields = fields_per_word(bits)
    first = start // fields
    codes = np.empty((tensor.shape[0], stop - start), np.int8)
    for row, words in tensor.column_blocks(first, words_for(stop, bits)):
        block = unpack_across(words if arrange is None else arrange(words), bits)
        codes[row : row + len(words)] = block[:, start - first * fields : stop - first * fields]
    return codes


def read_rows_across(tensor: StoredTensor, bits: Bits, start: int, stop: int) -> npt.NDArray[np.int8]:
    """Unpack the rows ``start … stop-1`` of a tensor [N,W], packed along W: [W·fields, stop-start]."""
    codes = np.empty((tensor.shape[1] * fields_per_word(bits), stop - start), np.int8)
    for row in range(start, stop, _ROWS_AT_ONCE):
        # Transposing words moves fewer elements than transposing codes.
        words = tensor.rows(row, min(row + _ROWS_AT_ONCE, stop)).T
        codes[:, row - start : row - start + words.shape[1]] = unpack_down(words, bits)
    return codes


def _octets(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of words, the lowest first."""
    return np.ascontiguousarray(words).view(np.uint8)


def _extract(octets: npt.NDArray[np.uint8], field: int, bits: Bits, codes: npt.NDArray[np.int8]) -> None:
    """Write a field of each byte, counted from the beginning of its word, to ``codes`` as a signed code."""
    if bits == 8:
        np.bitwise_xor(octets, np.uint8(0x80), out=codes.view(np.uint8))
    else:
        nibbles = octets >> np.uint8(4) if field % 2 else octets & np.uint8(0x0F)
        np.subtract(nibbles.view(np.int8), np.int8(8), out=codes)
