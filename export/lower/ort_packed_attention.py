# SPDX-License-Identifier: Apache-2.0
"""A lowered decoder that can also attend to a packed cache.

Both attentions of a layer stand behind one ``If``: the exact one over float rows, as a prefill needs it, and
one over packed rows. So weights exist once, and either attention writes its new rows in place.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import onnx_ir as ir

from starkv.export.lower.attention_weights import (
    GROUP_QUERY_ATTENTION,
    AttentionInputs,
    attention_inputs,
    attention_nodes,
)
from starkv.export.lower.branch import Branch
from starkv.export.lower.graph_edit import new_input, replace_node
from starkv.export.lower.ort_attention import MICROSOFT

PACKED = "packed"
"""Input of a decoder that can attend to a packed cache: [1] bool in host memory, whether it is to."""


class PackedAttention(Protocol):
    """How a decoder attends to a packed cache."""

    def updated_inputs(self, layer: int, inputs: AttentionInputs) -> dict[str, ir.Value]:
        """New inputs of the graph that a layer writes to, by the names of the outputs that they become."""
        ...

    def write_branch(
        self, branch: Branch, layer: int, inputs: AttentionInputs, updated: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Write a layer's attention to the packed cache.

        Args:
            branch: where to.
            layer: its index.
            inputs: what the exact attention reads.
            updated: values of :meth:`updated_inputs`.

        Returns:
            out ``[B, S, Hq * D]``, ``past_k`` and ``past_v`` afterwards, and ``updated`` afterwards.
        """
        ...


def add_packed_attention(model: ir.Model, packed: Callable[[ir.Model], PackedAttention]) -> None:
    """Put a second attention beside every layer's, which the new input ``packed`` chooses.

    Args:
        model: decoder of an engine for ONNX Runtime.
        packed: makes that attention for a model.
    """
    graph = model.graph
    attention = packed(model)
    flag = new_input(graph, PACKED, ir.DataType.BOOL, [1])
    for layer, node in enumerate(attention_nodes(graph)):
        inputs = attention_inputs(node)
        updated = attention.updated_inputs(layer, inputs)
        types = [ir.DataType.FLOAT] * 3 + [value.dtype or ir.DataType.FLOAT for value in updated.values()]
        branch = Branch(graph, f"layers.{layer}/packed")
        results = attention.write_branch(branch, layer, inputs, list(updated.values()))
        exact = Branch(graph, f"layers.{layer}/exact")
        floats = exact.append(
            ir.node(
                GROUP_QUERY_ATTENTION,
                node.inputs,
                dict(node.attributes.items()),
                domain=MICROSOFT,
                num_outputs=3,
                name=f"layers.{layer}/exact/{GROUP_QUERY_ATTENTION}",
            )
        )
        untouched = [exact.op("Identity", value) for value in updated.values()]
        branches = {
            "then_branch": branch.finish(results, types),
            "else_branch": exact.finish([*floats, *untouched], types),
        }
        either = ir.node("If", [flag], branches, num_outputs=len(types), name=f"layers.{layer}/If")
        replace_node(graph, node, either)
        for (name, before), after in zip(updated.items(), either.outputs[3:], strict=True):
            after.name, after.type, after.shape = name, before.type, before.shape
            graph.outputs.append(after)
