# SPDX-License-Identifier: Apache-2.0
"""The same graph in 16 bits: activations, KV cache and weights in float16 or bfloat16.

What 16 bits would spoil stays float32: norms and the residual stream between them (its values grow from layer
to layer, in Qwen2.5-VL beyond float16's range), the lengths of hidden states, and the logits. Rotary tables
come in as float32 and are rounded once, as PyTorch does it.
"""

import onnx_ir as ir

from starkv.export.tensor_file import TensorFile

ISLANDS = frozenset(
    ("RMSNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization", "ReduceL2", "Where")
)
"""Operators that compute in float32; so do sums of two activations, the residual connections. Where makes an
attention bias of a mask, and ONNX Runtime has none in bfloat16."""
MOVES = frozenset(("Gather", "GatherND", "Slice", "Reshape", "Transpose", "Unsqueeze", "Concat", "Split"))
"""Operators that compute nothing: they put out the dtype that they get."""
NARROW_INPUTS = ("past_k.", "past_v.")
NARROW_OUTPUTS = ("present_k.", "present_v.", "q_window")
"""Beginnings of the names of inputs and outputs in 16 bits; all others stay what they are."""


def narrow_activations(model: ir.Model, dtype: ir.DataType, data: TensorFile) -> None:
    """Change a lowered graph of float32 to ``dtype``.

    Scales of quantized weights have ``dtype`` already.

    Args:
        model: changed; all its initializers lie in data files or are constants.
        dtype: FLOAT16 or BFLOAT16.
        data: where re-encoded weights go.
    """
    _Narrowing(model.graph, dtype, data).run()


def _feeds_lengths(node: ir.Node) -> bool:
    """Whether a node only makes rows whose length is taken: those that calibration has divided."""
    readers = [use.node.op_type for value in node.outputs for use in value.uses()]
    return node.op_type == "Mul" and bool(readers) and set(readers) == {"ReduceL2"}


class _Narrowing:
    def __init__(self, graph: ir.Graph, dtype: ir.DataType, data: TensorFile) -> None:
        self._graph, self._dtype, self._data = graph, dtype, data
        self._floats = (ir.DataType.FLOAT, dtype)
        self._converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self._graph.inputs:
            if str(value.name).startswith(NARROW_INPUTS):
                value.dtype = self._dtype
        wanted = {value: value.dtype for value in self._graph.outputs}
        for node in list(self._graph):
            self._narrow(node)
        for index, value in enumerate(self._graph.outputs):
            narrow = str(value.name).startswith(NARROW_OUTPUTS)
            self._set_output(index, value, self._dtype if narrow else wanted[value])

    def _narrow(self, node: ir.Node) -> None:
        if node.op_type == "Cast":
            return
        dtype = self._dtype_of(node)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in self._floats and value.dtype != dtype:
                node.replace_input_with(index, self._converted_value(value, dtype, node))
        has_float_input = any(value is not None and value.dtype in self._floats for value in node.inputs)
        for value in node.outputs:
            # Of operators without any float input (Shape, Equal) outputs are no floats.
            if has_float_input:
                value.dtype = dtype

    def _dtype_of(self, node: ir.Node) -> ir.DataType:
        """What a node computes in."""
        if node.op_type in ISLANDS or _feeds_lengths(node):
            return ir.DataType.FLOAT
        floats = [value for value in node.inputs if value is not None and value.dtype in self._floats]
        if node.op_type in MOVES and floats and not floats[0].is_initializer():
            return floats[0].dtype or self._dtype
        if node.op_type == "Add" and len(floats) == 2 and not any(value.is_initializer() for value in floats):
            return ir.DataType.FLOAT
        return self._dtype

    def _converted_value(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        key = value, dtype
        if key not in self._converted:
            self._converted[key] = (
                self._converted_initializer(value, dtype)
                if value.is_initializer()
                else self._cast(value, dtype, before)
            )
        return self._converted[key]

    def _converted_initializer(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        tensor = value.const_value
        name = f"{value.name}.{dtype.name.lower()}"
        converted: ir.TensorProtocol
        if isinstance(tensor, ir.ExternalTensor):
            converted = self._data.convert(tensor, name, dtype)
        elif tensor is not None:
            converted = ir.tensor(tensor.numpy().astype(dtype.numpy()), name=name)
        else:
            raise ValueError(f"{value.name} has no content")
        result = ir.Value(name=name, const_value=converted, type=ir.TensorType(dtype), shape=value.shape)
        self._graph.register_initializer(result)
        return result

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node | None) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": dtype.value}, name=f"{value.name}/Cast.{dtype.name.lower()}")
        result = cast.outputs[0]
        result.name, result.dtype, result.shape = f"{value.name}.{dtype.name.lower()}", dtype, value.shape
        if before is None:
            self._graph.append(cast)
        else:
            self._graph.insert_before(before, cast)
        return result

    def _set_output(self, index: int, value: ir.Value, dtype: ir.DataType | None) -> None:
        if value.dtype == dtype or dtype not in self._floats or dtype is None:
            return
        name = value.name
        value.name = f"{name}.{self._dtype.name.lower()}"
        result = self._cast(value, dtype, None)
        result.name = name
        self._graph.outputs[index] = result
