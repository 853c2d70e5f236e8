# SPDX-License-Identifier: Apache-2.0
"""A lowered graph, run node by node: ONNX Runtime for standard operators, an implementation for plugins.

Floats of 16 bits are widened, computed with, and rounded again after every node, as a strongly typed engine
that fuses nothing would do it.
"""

import time
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from fake_tensorrt.state import MisuseError
from numpy.typing import NDArray

Array = NDArray[Any]
NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
ONE_TYPE = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "Sum", "Equal", "Less", "Greater"),
        *("MatMul", "Gemm", "Concat", "Where", "LayerNormalization"),
    )
)
"""Operators whose operands must have one type."""
_FOLLOWS_SECOND = frozenset(("Where",))


def wide(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype in NARROW else array


def is_float(dtype: np.dtype[Any]) -> bool:
    return dtype in NARROW or dtype == np.float32


@dataclass
class Program:
    """A graph's nodes and constants.

    Args:
        graph: in the TensorRT dialect.
        constants: content of its initializers.
        opset: of the standard operators.
        fold: compute what follows from constants alone only once.
    """

    graph: onnx.GraphProto
    constants: dict[str, Array]
    opset: int
    fold: bool = False
    sessions: dict[str, Any] = field(default_factory=dict)
    peak: int = 0
    """Most bytes of values that lived at once, inputs, outputs and constants not counted."""
    times: dict[str, float] = field(default_factory=dict)
    """Node → milliseconds of its last run."""
    _folded: dict[str, Array] = field(default_factory=dict)
    _last_use: dict[str, int] = field(default_factory=dict)

    def replace(self, constants: Mapping[str, Array]) -> None:
        """Put other constants in."""
        self.constants.update(constants)
        self.sessions.clear()
        self._folded.clear()

    def run(self, feeds: Mapping[str, Array], run_plugin: Any) -> dict[str, Array]:
        """Values of all outputs; plugins write into what they alias."""
        steps = self.steps(feeds, run_plugin, ())
        while True:
            try:
                next(steps)
            except StopIteration as done:
                results: dict[str, Array] = done.value
                return results

    def steps(
        self, feeds: Mapping[str, Array], run_plugin: Any, shown: Collection[str]
    ) -> Generator[tuple[str, Array], None, dict[str, Array]]:
        """Run, and stop behind each value that is to be shown; at last, the values of all outputs."""
        values: dict[str, Array] = {**self.constants, **self._folded, **feeds}
        outputs = {entry.name for entry in self.graph.output}
        if not self._last_use:
            nodes = enumerate(self.graph.node)
            self._last_use = {name: index for index, node in nodes for name in node.input}
        live = 0
        self.peak = 0
        for index, node in enumerate(self.graph.node):
            if node.output[0] in self._folded:
                continue
            run = run_plugin if node.domain == "ai.starkv" else self._run_node
            begun = time.perf_counter()
            results = run(node, values)
            self.times[node.name] = 1000 * (time.perf_counter() - begun)
            values.update(results)
            if self.fold and self._is_constant(node):
                self._folded.update(results)
                continue
            live += sum(array.nbytes for name, array in results.items() if name not in outputs)
            self.peak = max(self.peak, live)
            for name in node.output:
                if name in shown:
                    yield name, values[name]
            for name in set(node.input):
                kept = name in outputs or name in self.constants or name in self._folded or name in feeds
                if self._last_use.get(name) == index and not kept and name in values:
                    live -= values.pop(name).nbytes
        return {name: values[name] for name in outputs}

    def _is_constant(self, node: onnx.NodeProto) -> bool:
        known = self.constants.keys() | self._folded.keys()
        return not node.domain and all(name in known for name in node.input if name)

    def _run_node(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> dict[str, Array]:
        inputs = [values[name] for name in node.input if name]
        check_types(node, inputs)
        if node.op_type == "Cast":
            to = onnx.helper.tensor_dtype_to_np_dtype(onnx.helper.get_attribute_value(node.attribute[0]))
            return {node.output[0]: inputs[0].astype(to)}
        if node.op_type == "DequantizeLinear":
            codes, scales = inputs
            block = len(codes) // len(scales)
            product = codes.astype(np.float32) * np.repeat(wide(scales), block, axis=0)
            return {node.output[0]: product.astype(scales.dtype)}
        session = self.sessions.get(node.name) or self._open(node, values)
        feeds = {name: wide(values[name]) for name in session.taken}
        results = session.session.run(None, feeds)
        narrow = self._result_type(node, inputs)
        return {
            name: result.astype(narrow) if narrow is not None and result.dtype == np.float32 else result
            for name, result in zip(node.output, results, strict=True)
            if name
        }

    @staticmethod
    def _result_type(node: onnx.NodeProto, inputs: list[Array]) -> np.dtype[Any] | None:
        source = inputs[1] if node.op_type in _FOLLOWS_SECOND else inputs[0]
        return source.dtype if source.dtype in NARROW else None

    def _open(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> Any:
        names = list(dict.fromkeys(name for name in node.input if name))
        fixed = [name for name in names if name in self.constants or name in self._folded]
        taken = [name for name in names if name not in fixed]
        kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(wide(values[name]).dtype) for name in taken}
        graph = onnx.helper.make_graph(
            [node],
            node.name,
            [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
            [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name],
            [onnx.numpy_helper.from_array(wide(values[name]), name) for name in fixed],
        )
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)], ir_version=10
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.sessions[node.name] = Opened(session, taken)
        return self.sessions[node.name]


@dataclass(frozen=True)
class Opened:
    """A node's session, and the inputs that it takes at each run."""

    session: Any
    taken: list[str]


def check_types(node: onnx.NodeProto, inputs: list[Array]) -> None:
    """Strongly typed networks don't convert operands (NvInfer.h kSTRONGLY_TYPED)."""
    operands = inputs[1:] if node.op_type == "Where" else inputs
    if node.op_type in ONE_TYPE:
        kinds = {array.dtype for array in operands}
        if len(kinds) > 1:
            raise MisuseError(
                f"{node.name}: operands of {sorted(map(str, kinds))} in a strongly typed network"
            )


def constants_of(graph: onnx.GraphProto, folder: str) -> dict[str, Array]:
    """Content of all initializers; 4-bit codes as int8."""
    found = {}
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor, folder)
        found[tensor.name] = array.astype(np.int8) if tensor.data_type == onnx.TensorProto.INT4 else array
    return found
