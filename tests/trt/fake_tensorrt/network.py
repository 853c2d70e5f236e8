# SPDX-License-Identifier: Apache-2.0
"""Networks, their layers and tensors."""

from typing import Any

import onnx
from fake_tensorrt.binding import Bound, Dims, expect
from fake_tensorrt.enums import KINDS
from fake_tensorrt.plugin_nodes import ALIASES
from fake_tensorrt.shapes import ShapeModel
from fake_tensorrt.state import Current
from numpy.typing import NDArray


class ITensor(Bound):
    _name: str
    _shape: tuple[int, ...]
    _dims: tuple[str, ...]
    _kind: str
    _role: str

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> Dims:
        return Dims(self._shape)

    @property
    def dtype(self) -> Any:
        return getattr(Current.get().enum("DataType"), self._kind)

    @property
    def is_network_input(self) -> bool:
        return self._role == "input"

    @property
    def is_network_output(self) -> bool:
        return self._role == "output"

    def get_dimension_name(self, index: int) -> str:
        return self._dims[index]


class ILayer(Bound):
    _name: str
    _inputs: list[ITensor]
    _outputs: list[ITensor]

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class INetworkDefinition(Bound):
    _strongly: bool
    _builder: Any
    _graph: onnx.GraphProto | None
    _opset: int
    _constants: dict[str, NDArray[Any]]
    _shapes: ShapeModel | None
    _inputs: list[ITensor]
    _outputs: list[ITensor]
    _layers: list[ILayer]
    _debug: list[str]

    @classmethod
    def empty(cls, builder: Any, strongly: bool) -> "INetworkDefinition":
        lists: dict[str, Any] = {name: [] for name in ("_inputs", "_outputs", "_layers", "_debug")}
        made: INetworkDefinition = cls.make(
            _strongly=strongly, _builder=builder, _graph=None, _opset=0, _constants={}, _shapes=None, **lists
        )
        return made

    @property
    def name(self) -> str:
        return self._graph.name if self._graph is not None else "Unnamed Network 0"

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> ILayer:
        return self._layers[index]

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]

    def get_flag(self, flag: Any) -> bool:
        flags = expect(flag, Current.get().enum("NetworkDefinitionCreationFlag"), "flag")
        return flags.name == "STRONGLY_TYPED" and self._strongly

    def mark_debug(self, tensor: ITensor) -> bool:
        """NvInfer.h markDebug: false for what can't be marked, such as a tensor of another network."""
        name = expect(tensor, ITensor, "tensor").name
        own = any(tensor is output for layer in self._layers for output in layer._outputs)
        if own and name not in self._debug:
            self._debug.append(name)
        return own

    def unmark_debug(self, tensor: ITensor) -> bool:
        marked = tensor.name in self._debug
        if marked:
            self._debug.remove(tensor.name)
        return marked

    def is_debug_tensor(self, tensor: ITensor) -> bool:
        return tensor.name in self._debug

    def fill(self, graph: onnx.GraphProto, opset: int, constants: dict[str, NDArray[Any]]) -> None:
        """Become the network of a graph."""
        self._graph, self._opset, self._constants = graph, opset, constants
        self._shapes = ShapeModel(graph, constants, opset)
        self._inputs = [_tensor(entry, "input") for entry in graph.input]
        self._outputs = [_tensor(entry, "output") for entry in graph.output]
        tensors = {tensor.name: tensor for tensor in (*self._inputs, *self._outputs)}
        for node in graph.node:
            made = [tensors.setdefault(name, _inner(name)) for name in node.output if name]
            taken = [tensors[name] for name in node.input if name in tensors]
            self._layers.append(ILayer.make(_name=node.name, _inputs=taken, _outputs=made))

    def aliases(self) -> dict[str, str]:
        """Output of the network → input whose memory a plugin writes it into."""
        assert self._graph is not None
        return {
            node.output[output]: node.input[source]
            for node in self._graph.node
            for output, source in ALIASES.get(node.op_type, {}).items()
        }


def _tensor(entry: onnx.ValueInfoProto, role: str) -> ITensor:
    kind = entry.type.tensor_type
    dims = kind.shape.dim
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    made: ITensor = ITensor.make(
        _name=entry.name,
        _shape=tuple(int(dim.dim_value) if dim.HasField("dim_value") else -1 for dim in dims),
        _dims=tuple(dim.dim_param for dim in dims),
        _kind=next(name for name, known in KINDS.items() if known == dtype),
        _role=role,
    )
    return made


def _inner(name: str) -> ITensor:
    made: ITensor = ITensor.make(_name=name, _shape=(), _dims=(), _kind="FLOAT", _role="inner")
    return made
