# SPDX-License-Identifier: Apache-2.0
"""Quantized linear layers as ONNX Runtime's own operator, MatMulNBits.

ONNX Runtime makes the same of DequantizeLinear and MatMul by itself, whenever a session opens: a model of 7
billion weights then takes more than twice as long to load, and more memory while it does.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import onnx_ir as ir

from starkv.export.lower.graph_edit import replace_node
from starkv.export.lower.ort_attention import MICROSOFT
from starkv.export.lower.ort_weights import transposed_scales, unsigned_codes, unsigned_zero_points
from starkv.export.quantize.columns import Bits
from starkv.export.tensor_file import TensorFile
from starkv.host import usable_processors

_ACCURACY_LEVEL = 4
"""In float32, for processors: activations are rounded to 8 bits, block by block, since products of such
integers are several times as fast. GPUs know no such thing."""

_BITS: dict[ir.DataType | None, Bits] = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer of the canonical graph: DequantizeLinear, MatMul, and Add where it has a bias."""

    dequantize: ir.Node
    product: ir.Node
    add: ir.Node | None
    bias: ir.Value | None


def quantized_linears(graph: ir.Graph) -> list[QuantizedLinear]:
    """Find the linear layers whose weights MatMulNBits can read."""
    return [layer for node in graph for layer in _layers_of(node)]


def _layers_of(node: ir.Node) -> Iterator[QuantizedLinear]:
    if node.op_type != "DequantizeLinear" or node.domain:
        return
    codes = node.inputs[0]
    if codes is None or codes.dtype not in _BITS or not isinstance(codes.const_value, ir.ExternalTensor):
        return
    uses = node.outputs[0].uses()
    if all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses):
        for use in uses:
            yield QuantizedLinear(
                node, use.node, *_bias_of(use.node, int(codes.const_value.shape.numpy()[1]))
            )


def _bias_of(product: ir.Node, outputs: int) -> tuple[ir.Node | None, ir.Value | None]:
    uses = product.outputs[0].uses()
    if len(uses) != 1 or uses[0].node.op_type != "Add" or product.outputs[0].is_graph_output():
        return None, None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    if other is None or other.const_value is None or other.const_value.shape.numpy() != (outputs,):
        return None, None
    return add, other


def lower_quantized_linears(model: ir.Model, data: TensorFile, dtype: ir.DataType) -> None:
    """Replace every quantized linear layer by MatMulNBits, its weights laid out anew in ``data``.

    Args:
        model: the canonical graph; changed.
        data: where the weights go.
        dtype: of activations, and therefore of scales.
    """
    graph = model.graph
    layers = quantized_linears(graph)
    moved: dict[ir.Node, list[ir.Value | None]] = {}
    with ThreadPoolExecutor(usable_processors()) as workers:
        for layer in layers:
            if layer.dequantize not in moved:
                moved[layer.dequantize] = _move(layer.dequantize, data, dtype, workers)
            _replace(graph, layer, moved[layer.dequantize], dtype)
    for dequantize, weights in moved.items():
        names = [str(value.name) for value in dequantize.inputs if value is not None]
        graph.remove(dequantize, safe=True)
        for name in names:
            del graph.initializers[name]
        for weight in weights:
            if weight is not None:
                graph.register_initializer(weight)


def _move(
    dequantize: ir.Node, data: TensorFile, dtype: ir.DataType, workers: ThreadPoolExecutor
) -> list[ir.Value | None]:
    """Codes, scales and zero points as MatMulNBits reads them."""
    codes, scales, *zero_points = (_external(value) for value in dequantize.inputs if value is not None)
    bits, block_size = _BITS[codes.dtype], dequantize.attributes["block_size"].as_int()
    return [
        _initializer(unsigned_codes(codes, bits, block_size, data, workers)),
        _initializer(transposed_scales(scales, dtype, data, workers)),
        _initializer(unsigned_zero_points(zero_points[0], bits, data)) if zero_points else None,
    ]


def _external(value: ir.Value | None) -> ir.ExternalTensor:
    tensor = None if value is None else value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        raise ValueError(f"{value} is no tensor of a data file")
    return tensor


def _initializer(tensor: ir.TensorProtocol) -> ir.Value:
    name = str(tensor.name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)


def _replace(
    graph: ir.Graph, layer: QuantizedLinear, weights: list[ir.Value | None], dtype: ir.DataType
) -> None:
    codes = _external(layer.dequantize.inputs[0])
    features, outputs = codes.shape.numpy()
    node = ir.node(
        "MatMulNBits",
        _without_missing_end([layer.product.inputs[0], *weights, None, layer.bias]),
        {
            "K": features,
            "N": outputs,
            "bits": _BITS[codes.dtype],
            "block_size": layer.dequantize.attributes["block_size"].as_int(),
        }
        | ({"accuracy_level": _ACCURACY_LEVEL} if dtype == ir.DataType.FLOAT else {}),
        domain=MICROSOFT,
        name=str(layer.product.name).replace("MatMul", "MatMulNBits"),
    )
    replace_node(graph, layer.add or layer.product, node)
    if layer.add:
        graph.remove(layer.product, safe=True)


def _without_missing_end(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    """Missing inputs need a place only before others."""
    while inputs[-1] is None:
        inputs = inputs[:-1]
    return inputs
