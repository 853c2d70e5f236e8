# SPDX-License-Identifier: Apache-2.0
"""Element types of a graph's values, as a strongly typed network infers them."""

from collections.abc import Mapping

import onnx

from starkv.trt_compat.plugins import NAMESPACE

INT32: int = onnx.TensorProto.INT32
INT64: int = onnx.TensorProto.INT64
FLOAT: int = onnx.TensorProto.FLOAT
BOOL: int = onnx.TensorProto.BOOL
_COMPARISONS = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or"))
_PLUGIN_OUTPUTS = {
    "KVCompress": (None, None, INT32, INT32, INT64, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT),
    "PackableKVAttention": (None, None, None, INT32, INT32),
}
"""Of plugins that put out several types; None is the cache's type, which is that of the first input."""


def value_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element type of every value whose type follows from those before it."""
    types: dict[str, int] = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {entry.name: entry.type.tensor_type.elem_type for entry in graph.input}
    for node in graph.node:
        for index, name in enumerate(node.output):
            found = _output_type(node, index, types)
            if name and found is not None:
                types[name] = found
    return types


def _output_type(node: onnx.NodeProto, index: int, types: Mapping[str, int]) -> int | None:
    inputs = [types.get(name) for name in node.input]
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.domain == NAMESPACE:
        kinds = _PLUGIN_OUTPUTS.get(node.op_type)
        chosen = None if kinds is None else kinds[index]
        return inputs[0] if chosen is None else chosen
    if node.op_type == "Cast":
        return int(attributes["to"].i)
    if node.op_type in ("Shape", "Size", "ArgMax", "ArgMin", "NonZero"):
        return INT64
    if node.op_type == "TopK" and index == 1:
        return INT64
    if node.op_type in _COMPARISONS:
        return BOOL
    if node.op_type in ("DequantizeLinear", "Where"):
        return inputs[1]
    if node.op_type == "Constant":
        return int(attributes["value"].t.data_type) if "value" in attributes else None
    return inputs[0] if inputs else None
