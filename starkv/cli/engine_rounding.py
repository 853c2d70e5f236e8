# SPDX-License-Identifier: Apache-2.0
"""A graph in float32 that rounds as one in 16 bits does: what rounding alone does to a model.

Everything that the lowered graphs of 16 bits compute in 16 bits gets rounded inputs and a rounded result;
what they leave in float32 (norms, the residual stream) stays as it is.
"""

from collections import defaultdict
from typing import Any

from starkv.cli.engine_copies import Change
from starkv.manifest import ComputeDtype

_NUMBERS: dict[str, tuple[int, ...]] = {
    "GroupQueryAttention": (0, 1, 2),
    "Attention": (0, 1, 2),
    "MultiHeadAttention": (0, 1, 2),
    "RotaryEmbedding": (0, 1, 2),
    "MatMulNBits": (0, 2, 5),
}
"""Inputs that are floating-point numbers in 16 bits, of operators with others."""
_PLAIN = frozenset(
    ("MatMul", "Gemm", "Add", "Sub", "Mul", "Div", "Sigmoid", "Gelu", "Tanh", "Softmax", "Erf")
)
"""Operators all of whose inputs are such numbers. All others compute nothing, or in float32: see
``starkv.export.lower.compute_dtype``."""
_EXACT_PRODUCTS = 1
"""MatMulNBits' accuracy level with activations in float32; on processors engines round them to 8 bits."""


def rounding(dtype: ComputeDtype) -> Change:
    """The change that makes a graph of ONNX Runtime in float32 round to ``dtype``.

    Args:
        dtype: ``float16`` or ``bfloat16``.
    """
    return lambda graph: _Rounding(graph, dtype).run()


class _Rounding:
    def __init__(self, graph: Any, dtype: ComputeDtype) -> None:
        from onnx import TensorProto

        self._graph = graph
        self._wide = TensorProto.FLOAT
        self._narrow = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
        self._constants = {tensor.name for tensor in graph.initializer}
        self._readers: dict[str, set[str]] = defaultdict(set)
        for node in graph.node:
            for name in node.input:
                self._readers[name].add(node.op_type)
        self._rounded: dict[str, str] = {}
        self._nodes: list[Any] = []

    def run(self) -> None:
        for node in self._graph.node:
            self._add(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)

    def _add(self, node: Any) -> None:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = _EXACT_PRODUCTS
        inputs = self._inputs_in_16_bits(node)
        for index in inputs:
            if index < len(node.input) and node.input[index]:
                node.input[index] = self._rounded_input(node.input[index])
        self._nodes.append(node)
        if inputs:
            name = node.output[0]
            node.output[0] = f"{name}.exact"
            self._round(node.output[0], name)

    def _inputs_in_16_bits(self, node: Any) -> tuple[int, ...]:
        kind = node.op_type
        if kind in _NUMBERS:
            return _NUMBERS[kind]
        if kind not in _PLAIN:
            return ()
        residual = kind == "Add" and not self._constants.intersection(node.input)
        lengths = kind == "Mul" and self._readers[node.output[0]] == {"ReduceL2"}
        return () if residual or lengths else tuple(range(len(node.input)))

    def _rounded_input(self, name: str) -> str:
        if name not in self._rounded:
            self._rounded[name] = f"{name}.rounded"
            self._round(name, self._rounded[name])
        return self._rounded[name]

    def _round(self, source: str, target: str) -> None:
        from onnx import helper

        narrow = f"{target}.narrow"
        self._nodes.append(helper.make_node("Cast", [source], [narrow], to=self._narrow))
        self._nodes.append(helper.make_node("Cast", [narrow], [target], to=self._wide))
