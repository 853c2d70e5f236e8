# SPDX-License-Identifier: Apache-2.0
"""Quantized weights as TensorRT takes them.

TensorRT dequantizes 4-bit weights in blocks along one axis, without zero points; 8-bit ones only with one
scale per tensor or channel (NvInfer.h of 10.3, IDequantizeLayer). Blocks have 64 or 128 numbers (TensorRT
documentation, "Working with Quantized Types"). What it does not take becomes 16-bit numbers.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from starkv.errors import UsageError
from starkv.export.tensor_file import TensorFile, stored_bytes, stored_values

NATIVE_BLOCKS = (64, 128)
"""Rows that share a scale of 4-bit weights."""
_STRIPE = 16 << 20
"""Bytes of float32 that are expanded at once."""


def expand_foreign_weights(graph: ir.Graph, dtype: ir.DataType, data: TensorFile) -> int:
    """Replace quantized weights that TensorRT doesn't take by their values.

    Args:
        graph: changed; scales are float32 still.
        dtype: of the values.
        data: where they go.

    Returns:
        how many weights that were.

    Raises:
        UsageError: weights with zero points, as some checkpoints come; 4-bit ones would take four times the
            memory.
    """
    expanded = 0
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.domain:
            continue
        codes, scales = (_external(value) for value in node.inputs[:2])
        if len(node.inputs) > 2:
            raise UsageError(
                f"{codes.name}: the checkpoint's quantized weights have zero points, and TensorRT takes "
                "symmetric ones only; export with --quant int4 from the checkpoint that is not quantized, "
                "or this one with --quant fp32, which makes 16-bit weights of them"
            )
        if _is_native(codes, scales):
            continue
        values = _expand(codes, scales, dtype, data)
        weight = ir.Value(
            name=values.name, const_value=values, type=ir.TensorType(values.dtype), shape=values.shape
        )
        graph.register_initializer(weight)
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        graph.remove(node, safe=True)
        expanded += 1
    return expanded


def round_scales(graph: ir.Graph, dtype: ir.DataType, data: TensorFile) -> None:
    """Round the scales of quantized weights to ``dtype``.

    None becomes 0, which TensorRT refuses: what is too small for float16 becomes its smallest number, and
    weights of such blocks, which were far below it, at most eight times that.

    Args:
        graph: changed; only weights that TensorRT takes are quantized in it.
        dtype: FLOAT16 or BFLOAT16, which then is the dequantized weights'.
        data: where the scales go.
    """
    least = ml_dtypes.finfo(dtype.numpy()).smallest_subnormal
    rounded: dict[ir.ExternalTensor, ir.Value] = {}
    for node in graph:
        if node.op_type != "DequantizeLinear" or node.domain:
            continue
        scales = _external(node.inputs[1])
        if scales not in rounded:
            name = f"{scales.name}.{dtype.name.lower()}"
            reference, room = data.reserve(name, dtype, scales.shape.numpy())
            np.maximum(stored_values(scales).astype(room.dtype), least, out=room)
            rounded[scales] = ir.Value(
                name=name, const_value=reference, type=ir.TensorType(dtype), shape=reference.shape
            )
            graph.register_initializer(rounded[scales])
        node.replace_input_with(1, rounded[scales])
        node.outputs[0].dtype = dtype


def _external(value: ir.Value | None) -> ir.ExternalTensor:
    tensor = None if value is None else value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        raise ValueError(f"{value} is no tensor of a data file")
    return tensor


def _is_native(codes: ir.ExternalTensor, scales: ir.ExternalTensor) -> bool:
    features = int(codes.shape.numpy()[0])
    return codes.dtype == ir.DataType.INT4 and features // int(scales.shape.numpy()[0]) in NATIVE_BLOCKS


def _expand(
    codes: ir.ExternalTensor, scales: ir.ExternalTensor, dtype: ir.DataType, data: TensorFile
) -> ir.ExternalTensor:
    features, outputs = (int(size) for size in codes.shape.numpy())
    factors = stored_values(scales)
    block = features // len(factors)
    name = str(codes.name).removesuffix(".codes") + f".{dtype.name.lower()}"
    reference, room = data.reserve(name, dtype, (features, outputs))
    for first, last in _stripes(len(factors), block * outputs * 4):
        rows = slice(first * block, last * block)
        values = _integers(codes, rows).astype(np.float32).reshape(last - first, block, outputs)
        values *= factors[first:last, None]
        room[rows] = values.reshape(-1, outputs).astype(room.dtype)
    return reference


def _stripes(blocks: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    step = max(1, _STRIPE // bytes_each)
    for first in range(0, blocks, step):
        yield first, min(first + step, blocks)


def _integers(codes: ir.ExternalTensor, rows: slice) -> np.ndarray[tuple[int, int], np.dtype[np.int8]]:
    if codes.dtype == ir.DataType.INT8:
        integers: np.ndarray[tuple[int, int], np.dtype[np.int8]] = stored_values(codes)[rows]
        return integers
    packed = stored_bytes(codes)[rows]
    # Shifting a nibble to the top and back extends its sign.
    low, high = (packed << 4).view(np.int8) >> 4, packed.view(np.int8) >> 4
    return np.stack((low, high), axis=-1).reshape(len(packed), -1)
