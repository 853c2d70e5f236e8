# SPDX-License-Identifier: Apache-2.0
"""Lowered graphs made to run in ONNX Runtime: the definitions of the plugins' operators are put back."""

from pathlib import Path

import onnx

from starkv.onnx_ops import DOMAIN, OPSET, standard_functions
from starkv.trt_compat.version import CHECKED

EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Without it ONNX Runtime rounds float32 activations to 8 bits on their way into quantized layers."""

TARGETS = {str(version): version for version in CHECKED}


def runnable(graph: Path) -> Path:
    """A copy beside the graph, in which every plugin of ``vision`` or ``decoder`` has its function body.

    The bodies need a newer opset than the graph; what it uses means the same in both.
    """
    model = onnx.load(graph, load_external_data=False)
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    model.functions.extend(body for name, body in standard_functions().items() if name in used)
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = OPSET
    copy = graph.with_name(f"{graph.stem}.runnable.onnx")
    onnx.save(model, copy)
    return copy
