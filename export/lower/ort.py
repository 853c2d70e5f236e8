# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime dialect: the canonical graph in ONNX Runtime's own operators.

Attention, quantized linear layers and norms become one operator each. Graphs without a custom operator
(``compress.onnx`` and its like) stay as they are.
"""

from pathlib import Path

import onnx_ir as ir

from starkv.export.lower.ort_attention import MICROSOFT, lower_full_attention, lower_kv_attention
from starkv.export.lower.ort_matmul import lower_quantized_linears, quantized_linears
from starkv.export.lower.ort_norm import fuse_residual_norms
from starkv.export.lower.tensor_file import TensorFile


def lower_to_ort(source: Path, target: Path) -> None:
    """Rewrite the canonical graph ``source`` as ``target``.

    A graph with quantized weights gets a data file of its own, ``{target}.data``. The weights of any other
    stay where they are: ``target`` names the same data file, which must come to lie beside it.

    Raises:
        OSError: the disk is full.
    """
    model = ir.load(source)
    model.graph.opset_imports[MICROSOFT] = 1
    lower_kv_attention(model)
    lower_full_attention(model)
    fuse_residual_norms(model.graph)
    if quantized_linears(model.graph):
        _move_weights(model, target.with_suffix(".data"))
    ir.save(model, target)


def _move_weights(model: ir.Model, path: Path) -> None:
    data = TensorFile(path)
    lower_quantized_linears(model, data, ir.DataType.FLOAT)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) != path:
            value.const_value = data.copy(tensor)
