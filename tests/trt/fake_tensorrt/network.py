# SPDX-License-Identifier: Apache-2.0
"""Networks and the ONNX parser."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx.defs
from fake_tensorrt.enums import DataType, NetworkDefinitionCreationFlag
from fake_tensorrt.plugin_nodes import ALIASES
from fake_tensorrt.program import constants_of
from fake_tensorrt.state import Current, MisuseError, log
from numpy.typing import NDArray

_OPSETS = (((10, 6), 22), ((10, 0), 21))
_NEW = {"Attention": (10, 14), "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15)}
_INTERNAL = (DataType.FLOAT, DataType.HALF, DataType.BF16, DataType.INT32, DataType.INT64, DataType.BOOL)


@dataclass
class ITensor:
    name: str
    shape: tuple[int, ...] = ()
    dtype: DataType | None = None


@dataclass
class ILayer:
    name: str
    outputs: list[ITensor]

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_output(self, index: int) -> ITensor:
        return self.outputs[index]


@dataclass
class INetworkDefinition:
    strongly_typed: bool
    graph: onnx.GraphProto | None = None
    opset: int = 0
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    inputs: list[ITensor] = field(default_factory=list)
    outputs: list[ITensor] = field(default_factory=list)
    layers: list[ILayer] = field(default_factory=list)
    debug: list[str] = field(default_factory=list)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_input(self, index: int) -> ITensor:
        return self.inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self.outputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]

    def get_flag(self, flag: NetworkDefinitionCreationFlag) -> bool:
        return flag == NetworkDefinitionCreationFlag.STRONGLY_TYPED and self.strongly_typed

    def mark_debug(self, tensor: ITensor) -> bool:
        self.debug.append(tensor.name)
        return True

    def aliases(self) -> dict[str, str]:
        """Output of the network → input whose memory a plugin writes it into."""
        found = {}
        for node in self.graph.node if self.graph else ():
            for output, source in ALIASES.get(node.op_type, {}).items():
                found[node.output[output]] = node.input[source]
        return found


@dataclass(frozen=True)
class ParserError:
    text: str
    node: str = ""
    operator: str = ""

    def desc(self) -> str:
        return self.text

    def node_name(self) -> str:
        return self.node

    def node_operator(self) -> str:
        return self.operator


class OnnxParser:
    """The parser's rules, as far as it is known (onnx-tensorrt 10.1; later ones in docs/Changelog.md)."""

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        path = Path(model)
        if not path.is_file():
            self._errors.append(ParserError(f"Failed to open file: {model}"))
            return False
        proto = onnx.load(path, load_external_data=False)
        self._check(proto)
        if self._errors:
            for error in self._errors:
                log(self._logger, "ERROR", error.text)
            return False
        graph, network = proto.graph, self._network
        network.graph = graph
        network.opset = next(entry.version for entry in proto.opset_import if not entry.domain)
        network.constants = constants_of(graph, str(path.parent))
        network.inputs = [_tensor(entry) for entry in graph.input]
        network.outputs = [_tensor(entry) for entry in graph.output]
        network.layers = [ILayer(node.name, [ITensor(name) for name in node.output]) for node in graph.node]
        return True

    def _check(self, proto: onnx.ModelProto) -> None:
        state = Current.get()
        most = next(opset for first, opset in _OPSETS if state.numbers >= first)
        for entry in proto.opset_import:
            if not entry.domain and entry.version > most:
                self._errors.append(ParserError(f"opset {entry.version} is newer than {most}"))
        if proto.functions and not state.since(10, 7):
            name = proto.functions[0].name
            self._errors.append(ParserError(f"local function {name} hides the plugin of that name"))
        for entry in (*proto.graph.input, *proto.graph.output):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
            if dtype not in [kind.value for kind in _INTERNAL]:
                self._errors.append(ParserError(f"{entry.name}: unsupported type {dtype}"))
        for node in proto.graph.node:
            self._check_node(node)

    def _check_node(self, node: onnx.NodeProto) -> None:
        """Names decide, domains don't (ModelImporter.cpp parseNode and parseNodeStaticCheck)."""
        state = Current.get()
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if onnx.defs.has(node.op_type):
            if node.domain not in ("", "ai.onnx") or (
                node.op_type in _NEW and state.numbers < _NEW[node.op_type]
            ):
                self._fail(node, "No importer registered for this operator")
            return
        key = (
            node.op_type,
            attributes.get("plugin_version", b"1").decode(),
            attributes.get("plugin_namespace", b"").decode(),
        )
        if key not in state.plugins:
            self._fail(node, "Plugin not found, are the plugin name, version, and namespace correct?")

    def _fail(self, node: onnx.NodeProto, text: str) -> None:
        self._errors.append(ParserError(text, node.name, node.op_type))


def _tensor(entry: onnx.ValueInfoProto) -> ITensor:
    kind = entry.type.tensor_type
    shape = tuple(-1 if dim.dim_param else int(dim.dim_value) for dim in kind.shape.dim)
    return ITensor(entry.name, shape, DataType(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))


def check_flags(flags: int) -> bool:
    """Whether a network is strongly typed; without it starkv's types would be mere hints."""
    strongly = bool(flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if not strongly and not Current.get().since(11, 0):
        raise MisuseError("a network that is not strongly typed: TensorRT would choose types itself")
    return strongly
