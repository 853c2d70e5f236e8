# SPDX-License-Identifier: Apache-2.0
"""Rules about quantized weights."""

from collections.abc import Iterator

import numpy as np
import onnx

from starkv.export.lower.trt_rule import Rule, RuleContext, attributes_of
from starkv.export.lower.trt_weights import NATIVE_BLOCKS

Found = Iterator[tuple[str, str]]
_WHERE = "onnxOpImporters.cpp QuantDequantLinearHelper"


def _dequantizers(context: RuleContext) -> list[onnx.NodeProto]:
    return [node for node in context.nodes if node.op_type == "DequantizeLinear"]


def _weights_only(context: RuleContext) -> Found:
    for node in context.nodes:
        if node.op_type == "QuantizeLinear":
            yield node.name, "activations are not quantized"
    for node in _dequantizers(context):
        if any(name not in context.constants for name in node.input[:2]):
            yield node.name, "codes or scales are no constants"
        elif context.type_name(node.input[0]) != "INT4":
            yield node.name, f"codes of type {context.type_name(node.input[0])} in blocks"
    readers = {name for node in context.nodes if node.op_type != "DequantizeLinear" for name in node.input}
    for name, tensor in context.constants.items():
        if name in readers and tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.INT8):
            yield name, "quantized numbers are read without being dequantized"


def _symmetric(context: RuleContext) -> Found:
    for node in _dequantizers(context):
        if len(node.input) > 2 and node.input[2]:
            yield node.name, "a zero point"


def _blocks(context: RuleContext) -> Found:
    for node in _dequantizers(context):
        codes, scales = (context.constants.get(name) for name in node.input[:2])
        if codes is None or scales is None:
            continue
        attributes = attributes_of(node)
        if len(codes.dims) != 2 or len(scales.dims) != 2 or codes.dims[1] != scales.dims[1]:
            yield node.name, f"codes {list(codes.dims)} with scales {list(scales.dims)}"
            continue
        block = codes.dims[0] // scales.dims[0]
        if block not in NATIVE_BLOCKS or codes.dims[0] % scales.dims[0]:
            yield node.name, f"blocks of {codes.dims[0] / scales.dims[0]:g}, not of {NATIVE_BLOCKS}"
        elif (attributes.get("axis", 1), attributes.get("block_size", 0)) != (0, block):
            yield node.name, f"axis and block_size do not say that {block} rows share a scale"
        if codes.dims[1] % 2:
            yield node.name, "4-bit codes with an odd last dimension"


def _scales(context: RuleContext) -> Found:
    for node in _dequantizers(context):
        scales = context.constant(node.input[1])
        if scales is None:
            continue
        if context.type_name(node.input[1]) not in ("FLOAT", "FLOAT16", "BFLOAT16"):
            yield node.name, f"scales of type {context.type_name(node.input[1])}"
        elif not bool((scales.astype(np.float32) > 0).all()):
            yield node.name, "a scale that is not above 0"


QUANTIZATION_RULES = (
    Rule("weights-only", "TensorRT documentation, quantized types: 4-bit weights only", _weights_only),
    Rule("symmetric", f"{_WHERE}: zero points must be 0", _symmetric),
    Rule("blocks", f"{_WHERE}; TensorRT documentation: blocks of 64 or 128", _blocks),
    Rule("positive-scales", f"{_WHERE}: scales must be positive", _scales),
)
