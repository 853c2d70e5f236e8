# SPDX-License-Identifier: Apache-2.0
"""How quantized columns lie in a data file."""

from collections.abc import Sequence

import onnx_ir as ir

from starkv.export.quantize.blockwise import pack_int4
from starkv.export.quantize.columns import Bits, QuantizedColumns
from starkv.export.tensor_file import Room, TensorSpec


def quantized_specs(name: str, bits: Bits, rows: int, columns: int, block_size: int) -> list[TensorSpec]:
    """Codes and scales of a weight [rows, columns]."""
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    return [
        TensorSpec(f"{name}.codes", dtype, (rows, columns)),
        TensorSpec(f"{name}.scales", ir.DataType.FLOAT, (rows // block_size, columns)),
    ]


def put_columns(rooms: Sequence[Room], first: int, columns: QuantizedColumns, bits: Bits) -> None:
    """Write columns into the rooms of codes, scales and perhaps zero points."""
    end = first + columns.codes.shape[1]
    rooms[1][:, first:end] = columns.scales
    integers = [(rooms[0], columns.codes)]
    if columns.zero_points is not None:
        integers.append((rooms[2], columns.zero_points))
    for room, codes in integers:
        if bits == 4:
            room[:, first // 2 : end // 2] = pack_int4(codes)
        else:
            room[:, first:end] = codes
