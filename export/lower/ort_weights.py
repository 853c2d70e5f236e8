# SPDX-License-Identifier: Apache-2.0
"""Lays weights out as ONNX Runtime's MatMulNBits reads them, a stripe of columns at a time.

The canonical graph stores a quantized weight as signed codes [K,N], N running fastest; MatMulNBits wants
unsigned codes [N, K/block, block], K running fastest, with 4-bit codes in pairs. Neither the old nor the new
form of a weight is ever in memory as a whole.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from starkv.export.quantize.columns import Bits
from starkv.export.tensor_file import Bytes, TensorFile, stored_bytes, stored_values

_STRIPE_BYTES = 16 << 20
_LEAST_COLUMNS = 64
_TILE_BYTES = 1 << 17
"""What is packed at a time stays in a core's cache."""
_COPY_ROWS = 512
"""Rows transposed at a time: more of them, each on a page of its own, exceed the processor's page cache."""


def unsigned_codes(
    codes: ir.ExternalTensor, bits: Bits, block_size: int, data: TensorFile, workers: ThreadPoolExecutor
) -> ir.ExternalTensor:
    """Append signed codes [K,N] as uint8 [N, K/block_size, block_size*bits/8]; −2^(bits−1) becomes 0.

    Args:
        codes: int4 or int8.
        bits: of a code.
        block_size: inputs that share a scale.
        data: where to.
        workers: stripes of columns are laid out side by side.
    """
    features, outputs = codes.shape.numpy()
    reference, room = data.reserve(
        str(codes.name),
        ir.DataType.UINT8,
        (outputs, features // block_size, block_size * bits // 8),
    )
    rows = room.reshape(outputs, features * bits // 8)
    columns_per_byte = 8 // bits
    lay_out = _four_bit_rows if bits == 4 else _eight_bit_rows

    def stripe(first: int, last: int) -> None:
        # Mapped anew, so that the pages of a finished stripe are given back.
        signed = stored_bytes(codes)[:, first:last]
        lay_out(_transposed(signed), rows[first * columns_per_byte : last * columns_per_byte])

    _in_stripes(stripe, stored_bytes(codes).shape, workers)
    return reference


def unsigned_zero_points(zero_points: ir.ExternalTensor, bits: Bits, data: TensorFile) -> ir.ExternalTensor:
    """Append signed zero points [K/block,N] as uint8 [N, ⌈K/block*bits/8⌉], shifted as the codes are."""
    blocks, outputs = zero_points.shape.numpy()
    signed = _transposed(stored_bytes(zero_points))
    columns = -(-blocks * bits // 8)
    reference, room = data.reserve(str(zero_points.name), ir.DataType.UINT8, (outputs, columns))
    if bits == 4 and blocks % 2:
        # The last byte's high half belongs to no block.
        signed = np.pad(signed, ((0, 0), (0, 1)))
    (_four_bit_rows if bits == 4 else _eight_bit_rows)(signed, room)
    return reference


def transposed_scales(
    scales: ir.ExternalTensor, dtype: ir.DataType, data: TensorFile, workers: ThreadPoolExecutor
) -> ir.ExternalTensor:
    """Append scales [K/block,N] as [N, K/block] of ``dtype``."""
    blocks, outputs = scales.shape.numpy()
    reference, room = data.reserve(str(scales.name), dtype, (outputs, blocks))

    def stripe(first: int, last: int) -> None:
        room[first:last] = _transposed(stored_values(scales)[:, first:last]).astype(dtype.numpy())

    _in_stripes(stripe, (blocks, outputs), workers)
    return reference


def _in_stripes(
    work: Callable[[int, int], None], shape: tuple[int, ...], workers: ThreadPoolExecutor
) -> None:
    """Do ``work(first column, end)`` for all columns of a matrix [rows, columns]."""
    rows, columns = shape
    step = max(_LEAST_COLUMNS, _STRIPE_BYTES // rows)
    firsts = range(0, columns, step)
    for _ in workers.map(work, firsts, (min(first + step, columns) for first in firsts)):
        pass


def _transposed(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous copy of the transpose."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for first in range(0, len(matrix), _COPY_ROWS):
        result[:, first : first + _COPY_ROWS] = matrix[first : first + _COPY_ROWS].T
    return result


def _eight_bit_rows(signed: Bytes, target: Bytes) -> None:
    """[n,K] → [n,K]."""
    np.bitwise_xor(signed, np.uint8(0x80), out=target)


def _four_bit_rows(signed: Bytes, target: Bytes) -> None:
    """[n/2,K], two outputs in a byte, → [n,K/2], two inputs in a byte."""
    step = max(1, _TILE_BYTES // signed.shape[1])
    for first in range(0, len(signed), step):
        # Inputs k and k+1 of outputs n and n+1: four codes in 16 bits, n(k) lowest.
        quads = signed[first : first + step].view("<u2") ^ np.uint16(0x8888)
        low, high = quads & np.uint16(0x000F), quads & np.uint16(0xF000)
        middle = quads >> np.uint16(4)
        rows = target[2 * first : 2 * (first + step)]
        rows[0::2] = low | (middle & np.uint16(0x00F0))
        rows[1::2] = (middle & np.uint16(0x000F)) | (high >> np.uint16(8))
