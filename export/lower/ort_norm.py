# SPDX-License-Identifier: Apache-2.0
"""A residual sum and the norm behind it as one operator: fewer steps in every layer of a decode step."""

import onnx_ir as ir

from starkv.export.lower.ort_attention import MICROSOFT


def fuse_residual_norms(graph: ir.Graph) -> None:
    """Replace Add and RMSNormalization by SkipSimplifiedLayerNormalization.

    The sum stays a value of the graph, for the next residual connection.
    """
    for norm in list(graph):
        total = norm.inputs[0] if norm.op_type == "RMSNormalization" and not norm.domain else None
        add = None if total is None else total.producer()
        if total is None or add is None or add.op_type != "Add" or any(_is_constant(x) for x in add.inputs):
            continue
        if sum(use.node.op_type == "RMSNormalization" for use in total.uses()) > 1:
            continue
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain=MICROSOFT,
            num_outputs=4,
            name=str(norm.name).replace("RMSNormalization", "SkipSimplifiedLayerNormalization"),
        )
        # Mean and deviation, which only training wants.
        fused.outputs[1].name = fused.outputs[2].name = ""
        for old, new in ((norm.outputs[0], fused.outputs[0]), (total, fused.outputs[3])):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new)
        graph.insert_after(add, fused)
        graph.remove(norm, safe=True)
        graph.remove(add, safe=True)


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer()
