# SPDX-License-Identifier: Apache-2.0
"""What every dialect does to graphs: nodes in the place of others, and what is left over."""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from starkv.export.tensor_file import TensorFile


def new_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Append an input to a graph."""
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def replace_node(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put ``new`` in the place of ``old``, whose outputs are the first ones of ``new``."""
    for before, after in zip(old.outputs, new.outputs, strict=False):
        after.name, after.type, after.shape = before.name, before.type, before.shape
        graph_output = before.is_graph_output()
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=graph_output)
    graph.insert_after(old, new)
    graph.remove(old, safe=True)


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes and initializers that nothing reads any more."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def copy_others(graph: ir.Graph, data: TensorFile) -> None:
    """Move weights that need no change to the new data file."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) != data.path:
            value.const_value = data.copy(tensor)
