# SPDX-License-Identifier: Apache-2.0
"""The ONNX parser's rules, as far as they are known (onnx-tensorrt 10.1; later ones in docs/Changelog.md)."""

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.defs
from fake_tensorrt.binding import Bound, expect
from fake_tensorrt.callbacks import ILogger
from fake_tensorrt.enums import KINDS
from fake_tensorrt.network import INetworkDefinition
from fake_tensorrt.program import constants_of
from fake_tensorrt.state import Current, log

from starkv.export.lower.trt_operators import missing_reason
from starkv.trt_compat.version import TensorRTVersion

_OPSETS = (((10, 6), 22), ((10, 0), 21))
_PLUGIN_WINS = (10, 15)
"""From here on a node with ``plugin_namespace`` is a plugin even where a function has its name."""


class ParserError(Bound):
    _text: str
    _node: str
    _operator: str
    _index: int

    def desc(self) -> str:
        return self._text

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._node

    def node_operator(self) -> str:
        return self._operator

    def __str__(self) -> str:
        where = f"In node {self._index} with name: {self._node} and operator: {self._operator} "
        return (where if self._index >= 0 else "") + self._text


class OnnxParser(Bound):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._initialised = True
        self._network = expect(network, INetworkDefinition, "network")
        self._logger = expect(logger, ILogger, "logger")
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def supports_operator(self, op_name: str) -> bool:
        return missing_reason(op_name, TensorRTVersion(*Current.get().numbers)) is None

    def parse_from_file(self, model: str) -> bool:
        path = Path(expect(model, str, "model"))
        if not path.is_file():
            return self._report([_error(f"Failed to open file: {model}")])
        try:
            proto = onnx.load(path, load_external_data=False)
        except Exception:
            return self._report([_error(f"Failed to parse the ONNX model: {model}")])
        # NvOnnxParser.h parse: one network takes one model.
        if self._network._graph is not None:
            return self._report([_error("the network is not empty")])
        errors = [*_errors(proto)]
        if not errors:
            try:
                constants = constants_of(proto.graph, str(path.parent))
            except Exception as error:
                # WeightsContext.cpp: data beside the graph are read while it is parsed.
                errors = [_error(f"Failed to load weights: {error}")]
        if errors:
            return self._report(errors)
        opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
        self._network.fill(proto.graph, opset, constants)
        return True

    def _report(self, errors: list[ParserError]) -> bool:
        self._errors += errors
        for error in errors:
            log(self._logger, "ERROR", str(error))
        return False


def _error(text: str, node: onnx.NodeProto | None = None, index: int = -1) -> ParserError:
    name, operator = (node.name, node.op_type) if node is not None else ("", "")
    made: ParserError = ParserError.make(_text=text, _node=name, _operator=operator, _index=index)
    return made


def _errors(proto: onnx.ModelProto) -> Iterator[ParserError]:
    state = Current.get()
    most = next(opset for first, opset in _OPSETS if state.numbers >= first)
    for entry in proto.opset_import:
        if not entry.domain and entry.version > most:
            yield _error(f"opset {entry.version} is newer than {most}")
    for entry in (*proto.graph.input, *proto.graph.output):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
        if dtype not in KINDS.values():
            yield _error(f"{entry.name}: unsupported type {dtype}")
    functions = {function.name for function in proto.functions}
    for index, node in enumerate(proto.graph.node):
        if text := _refusal(node, functions):
            yield _error(text, node, index)


def _refusal(node: onnx.NodeProto, functions: set[str]) -> str:
    """Why a node is refused. Names decide, domains don't (ModelImporter.cpp, parseNode and its checker)."""
    state = Current.get()
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in functions and (state.numbers < _PLUGIN_WINS or "plugin_namespace" not in attributes):
        return f"local function {node.op_type} hides the plugin of that name"
    if onnx.defs.has(node.op_type):
        unknown = missing_reason(node.op_type, TensorRTVersion(*state.numbers))
        return f"No importer registered for op: {node.op_type}" if unknown or node.domain else ""
    key = (
        node.op_type,
        attributes.get("plugin_version", b"1").decode(),
        attributes.get("plugin_namespace", b"").decode(),
    )
    if key in state.plugins:
        return ""
    return "Plugin not found, are the plugin name, version, and namespace correct?"
