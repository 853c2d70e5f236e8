# SPDX-License-Identifier: Apache-2.0
"""Nodes of a branch of ``If``: it reads values of the graph around it, and its constants lie there, too.
What many branches read may be collected in the same way."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class Branch:
    """Collects a branch's nodes."""

    def __init__(self, graph: ir.Graph, scope: str) -> None:
        """Begin a branch.

        Args:
            graph: around it; gets the constants.
            scope: that names of nodes and values begin with.
        """
        self._graph, self._scope = graph, scope
        self._nodes: list[ir.Node] = []

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append a node; returns its outputs."""
        name = f"{self._scope}/{op_type}_{len(self._nodes)}"
        return self.append(
            ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        )

    def append(self, node: ir.Node) -> Sequence[ir.Value]:
        """Append a node; returns its outputs, named after it."""
        outputs: Sequence[ir.Value] = node.outputs
        for index, value in enumerate(outputs):
            value.name = f"{node.name}.{index}"
        self._nodes.append(node)
        return outputs

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node with one output; returns it."""
        return self.node(op_type, inputs, 1, domain, **attributes)[0]

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A constant of the graph around; the same name is the same constant."""
        known = self._graph.initializers.get(name)
        if known is not None:
            return known
        tensor = ir.tensor(np.asarray(array, order="C"), name=name)
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
        )
        self._graph.register_initializer(value)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        """A constant ``[n]`` i64."""
        return self.constant("ints_" + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def finish(self, outputs: Sequence[ir.Value], types: Sequence[ir.DataType]) -> ir.Graph:
        """The branch, with these outputs."""
        for value, dtype in zip(outputs, types, strict=True):
            value.type = ir.TensorType(dtype)
        return ir.Graph([], list(outputs), nodes=self._nodes, name=self._scope.replace("/", "."))

    def put_first(self) -> None:
        """Put the nodes ahead of all others of the graph around, for its branches to read."""
        self._graph.insert_before(self._graph[0], self._nodes)
