# SPDX-License-Identifier: Apache-2.0
"""Ways to spoil a lowered decoder."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def node_of(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def constant(model: onnx.ModelProto, name: str, array: np.ndarray, kind: int | None = None) -> str:
    tensor = numpy_helper.from_array(array, name)
    if kind is not None:
        tensor = helper.make_tensor(name, kind, array.shape, array)
    model.graph.initializer.append(tensor)
    return name


def add(model: onnx.ModelProto, op_type: str, inputs: list[str], **attributes: object) -> onnx.NodeProto:
    """Append a node that nothing reads."""
    outputs = attributes.pop("outputs", 1)
    assert isinstance(outputs, int)
    names = [f"added.{index}" for index in range(outputs)]
    node = helper.make_node(op_type, inputs, names, name="added", **attributes)
    model.graph.node.append(node)
    return node


def drop_attribute(model: onnx.ModelProto, op_type: str, name: str) -> None:
    node = node_of(model, op_type)
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def set_attribute(model: onnx.ModelProto, op_type: str, name: str, value: object) -> None:
    drop_attribute(model, op_type, name)
    node_of(model, op_type).attribute.append(helper.make_attribute(name, value))


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def set_external(model: onnx.ModelProto, key: str, value: str) -> None:
    tensor = external(model)
    kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    for name, content in (*kept, (key, value)):
        tensor.external_data.add(key=name, value=content)


def drop_length(model: onnx.ModelProto) -> None:
    tensor = external(model)
    kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != "length"]
    del tensor.external_data[:]
    for name, content in kept:
        tensor.external_data.add(key=name, value=content)


def set_opset(model: onnx.ModelProto, version: int) -> None:
    next(entry for entry in model.opset_import if entry.domain == "").version = version


def replace_scales(model: onnx.ModelProto, change: Callable[[np.ndarray], np.ndarray]) -> None:
    node = node_of(model, "DequantizeLinear")
    old = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    scales = np.ones(tuple(old.dims), np.float32)
    node.input[1] = constant(model, "new_scales", change(scales).astype(np.float16))


def replace_codes(model: onnx.ModelProto, columns: int) -> None:
    """Codes with another number of columns, and scales that fit them."""
    node = node_of(model, "DequantizeLinear")
    codes = np.zeros((128, columns), np.int8)
    node.input[0] = constant(model, "new_codes", codes, TensorProto.INT4)
    node.input[1] = constant(model, "new_scales", np.ones((1, columns), np.float16))
    set_attribute(model, "DequantizeLinear", "block_size", 128)


def rename(model: onnx.ModelProto, name: str) -> None:
    model.graph.node[3].name = name


def attention(model: onnx.ModelProto, more: Sequence[str] = (), **changes: object) -> None:
    """A native Attention that newer parsers take, but for the changes."""
    inputs = [*["inputs_embeds"] * 3, *more]
    add(model, "Attention", inputs, **({"TRT_decomposable": 1} | changes))


def other_type(model: onnx.ModelProto, name: str, kind: int) -> None:
    entry = next(value for value in (*model.graph.input, *model.graph.output) if value.name == name)
    entry.type.tensor_type.elem_type = kind


def unnamed(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_param")


def top_k(model: onnx.ModelProto, k: int, **attributes: object) -> None:
    add(model, "TopK", ["inputs_embeds", constant(model, "k", np.array([k]))], outputs=2, **attributes)
