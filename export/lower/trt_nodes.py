# SPDX-License-Identifier: Apache-2.0
"""Putting several nodes in the place of one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from starkv.export.lower.graph_edit import replace_node


class Replacement:
    """Nodes that are inserted before ``old``, and finally stand in its place."""

    def __init__(self, graph: ir.Graph, old: ir.Node) -> None:
        self._graph, self._old = graph, old
        self._count = 0

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Insert a node with one output."""
        return self.multi_op(op_type, *inputs, outputs=1, **attributes)[0]

    def multi_op(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, **attributes: Any
    ) -> list[ir.Value]:
        """Insert a node with several outputs, all of the dtype of its first input."""
        node = self._node(op_type, inputs, outputs, attributes)
        self._graph.insert_before(self._old, node)
        return list(node.outputs)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Insert a Cast unless the value has that dtype."""
        if value.dtype == dtype:
            return value
        result = self.op("Cast", value, to=dtype.value)
        result.dtype = dtype
        return result

    def finish(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> None:
        """Put a last node in the place of the old one; its output has the name and type of the old one's."""
        replace_node(self._graph, self._old, self._node(op_type, inputs, 1, attributes))

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector; equal ones are stored once."""
        return self._constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A constant scalar; equal ones are stored once."""
        return self._constant(f"{dtype.name.lower()}_{value!r}", np.array(value).astype(dtype.numpy()))

    def _constant(self, name: str, array: Any) -> ir.Value:
        found = self._graph.initializers.get(name)
        if found is None:
            tensor = ir.tensor(array, name=name)
            kind = ir.TensorType(tensor.dtype)
            found = ir.Value(name=name, const_value=tensor, type=kind, shape=tensor.shape)
            self._graph.register_initializer(found)
        return found

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, attributes: dict[str, Any]
    ) -> ir.Node:
        name = f"{self._old.name}/{op_type}_{self._count}"
        self._count += 1
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=name)
        first = inputs[0]
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.{index}"
            value.dtype = None if first is None else first.dtype
        return node
