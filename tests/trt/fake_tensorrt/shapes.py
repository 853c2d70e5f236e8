# SPDX-License-Identifier: Apache-2.0
"""Shapes and types of all values of a graph for given inputs, without computing anything.

ONNX's own inference does it. Plugins take part as copies of the inputs that their outputs are shaped like.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from fake_tensorrt.plugin_nodes import ALIASES, DOMAIN
from numpy.typing import NDArray

Shape = tuple[int, ...]
_LIKE_FIRST = {"KVAttention": 1, "FullAttention": 1, "KVCompress": 0, "PackableKVAttention": 1}
"""Plugin → how many of its outputs, from the first, are shaped like its first input."""
_SMALL = 64
"""Most elements of a constant whose content may decide a shape."""


class ShapeError(Exception):
    """Shapes contradict each other."""


@dataclass
class ShapeModel:
    """A graph as far as shapes go.

    Args:
        graph: in the TensorRT dialect.
        constants: content of its initializers, as far as it is known.
        opset: of the standard operators.
    """

    graph: onnx.GraphProto
    constants: Mapping[str, NDArray[Any]]
    opset: int
    _known: dict[tuple[tuple[str, Shape], ...], dict[str, tuple[Shape, int]]] = field(default_factory=dict)

    def outputs(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of the graph's outputs.

        Raises:
            ShapeError: the inputs' shapes contradict each other, or an output's can't be told.
        """
        named = self._names(shapes)
        values = self.values(shapes)
        found = {}
        for entry in self.graph.output:
            dims = entry.type.tensor_type.shape.dim
            shape = [named.get(dim.dim_param) if dim.dim_param else int(dim.dim_value) for dim in dims]
            declared = tuple(size for size in shape if size is not None)
            inferred = values[entry.name][0] if entry.name in values else None
            if inferred is None and len(declared) != len(shape):
                raise ShapeError(f"the shape of {entry.name} can't be told")
            if inferred is not None and any(
                size not in (None, known) for size, known in zip(shape, inferred, strict=True)
            ):
                raise ShapeError(f"{entry.name} is declared {shape}, computed {inferred}")
            found[entry.name] = declared if inferred is None else inferred
        return found

    def values(self, shapes: Mapping[str, Shape]) -> dict[str, tuple[Shape, int]]:
        """Shape and ONNX element type of each value whose shape can be told.

        Raises:
            ShapeError: the inputs' shapes contradict each other.
        """
        key = tuple(sorted(shapes.items()))
        if key not in self._known:
            self._known[key] = self._infer(shapes)
        return self._known[key]

    def peak(self, shapes: Mapping[str, Shape]) -> int:
        """Most bytes of values that live at once, inputs, outputs and constants not counted."""
        values = self.values(shapes)
        last_use = {name: index for index, node in enumerate(self.graph.node) for name in node.input}
        outputs = {entry.name for entry in self.graph.output}
        live, peak, held = 0, 0, dict[str, int]()
        for index, node in enumerate(self.graph.node):
            for name in node.output:
                if name in values and name not in outputs:
                    held[name] = _bytes(*values[name])
                    live += held[name]
            peak = max(peak, live)
            for name in set(node.input):
                if last_use[name] == index:
                    live -= held.pop(name, 0)
        return peak

    def _names(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        """Sizes of the inputs' named dimensions.

        NvInfer.h (10.16) ITensor::setDimensionName: those of one name must be equal at run time.
        """
        named: dict[str, tuple[int, str]] = {}
        for entry in self.graph.input:
            for dim, size in zip(entry.type.tensor_type.shape.dim, shapes[entry.name], strict=True):
                if not dim.dim_param:
                    continue
                known, other = named.setdefault(dim.dim_param, (size, entry.name))
                if known != size:
                    raise ShapeError(f"{dim.dim_param} is {known} in {other}, but {size} in {entry.name}")
        return {name: size for name, (size, _) in named.items()}

    def _infer(self, shapes: Mapping[str, Shape]) -> dict[str, tuple[Shape, int]]:
        self._names(shapes)
        inputs = [
            onnx.helper.make_tensor_value_info(
                entry.name, entry.type.tensor_type.elem_type, shapes[entry.name]
            )
            for entry in self.graph.input
        ]
        small = []
        for tensor in self.graph.initializer:
            content = self.constants.get(tensor.name)
            if content is not None and content.size <= _SMALL and content.dtype.kind == "i":
                small.append(onnx.numpy_helper.from_array(content, tensor.name))
            else:
                inputs.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, [*tensor.dims])
                )
        nodes = [part for node in self.graph.node for part in _without_plugins(node)]
        graph = onnx.helper.make_graph(nodes, "shapes", inputs, [], small)
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        try:
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            raise ShapeError(" ".join(str(error).split())) from None
        return {
            entry.name: (tuple(int(dim.dim_value) for dim in kind.shape.dim), kind.elem_type)
            for entry in (*inferred.graph.input, *inferred.graph.value_info)
            if (kind := entry.type.tensor_type).HasField("shape")
            and all(dim.HasField("dim_value") for dim in kind.shape.dim)
        }


def _without_plugins(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    if node.domain != DOMAIN:
        yield node
        return
    sources = dict.fromkeys(range(_LIKE_FIRST.get(node.op_type, 0)), 0)
    for output, source in (sources | ALIASES.get(node.op_type, {})).items():
        yield onnx.helper.make_node("Identity", [node.input[source]], [node.output[output]])


def _bytes(shape: Shape, kind: int) -> int:
    return int(np.prod(shape)) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
