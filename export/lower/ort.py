# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime dialect: the canonical graph in ONNX Runtime's own operators.

Attention, quantized linear layers and norms become one operator each. Graphs without weights
(``compress.onnx`` and its like) stay as they are, in float32.
"""

from pathlib import Path

import onnx_ir as ir

from starkv.export.lower.compute_dtype import narrow_activations
from starkv.export.lower.graph_edit import copy_others, remove_unused
from starkv.export.lower.ort_attention import (
    MICROSOFT,
    lower_full_attention,
    lower_kv_attention,
    lower_masked_attention,
)
from starkv.export.lower.ort_matmul import lower_quantized_linears, quantized_linears
from starkv.export.lower.ort_norm import fuse_residual_norms
from starkv.export.tensor_file import TensorFile
from starkv.manifest import ComputeDtype

_DTYPES: dict[ComputeDtype, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def lower_to_ort(source: Path, target: Path, compute_dtype: ComputeDtype = "float32") -> None:
    """Rewrite the canonical graph ``source`` as ``target``.

    A graph with quantized weights or of another dtype gets a data file of its own, ``{target}.data``. The
    weights of any other stay where they are: ``target`` names the same data file, which must come to lie
    beside it.

    Args:
        source: canonical graph.
        target: where to.
        compute_dtype: of activations and KV cache. The 16-bit ones are for GPUs.

    Raises:
        OSError: the disk is full.
    """
    model = ir.load(source)
    graph, dtype = model.graph, _DTYPES[compute_dtype]
    graph.opset_imports[MICROSOFT] = 1
    lower_kv_attention(model)
    lower_full_attention(model)
    fuse_residual_norms(graph)
    narrow = dtype != ir.DataType.FLOAT
    if quantized_linears(graph) or (narrow and graph.initializers):
        data = TensorFile(target.with_suffix(".data"))
        lower_quantized_linears(model, data, dtype)
        if narrow:
            lower_masked_attention(graph)
            narrow_activations(model, dtype, data)
            remove_unused(graph)
        copy_others(graph, data)
    ir.save(model, target)
