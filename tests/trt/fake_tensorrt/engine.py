# SPDX-License-Identifier: Apache-2.0
"""Engines: what a plan says of its tensors, and the memory that it takes."""

import json
from typing import Any

import onnx
from fake_tensorrt.binding import Bound, Dims, expect, whole
from fake_tensorrt.callbacks import ILogger
from fake_tensorrt.context import IExecutionContext
from fake_tensorrt.plan import Plan, Tensor
from fake_tensorrt.program import Program
from fake_tensorrt.shapes import ShapeModel
from fake_tensorrt.state import Current, State, log

_WORKSPACE = 4096
"""What plugins and kernels need beside the activations; a real engine's need depends on its kernels."""


class ICudaEngine(Bound):
    _plan: Plan
    _runtime: Any
    _state: State
    _program: Program
    _shapes: ShapeModel
    _tensors: dict[str, Tensor]
    _ready: bool
    """Whether all weights are there."""
    _budget: int
    _reserved: int
    _contexts: int
    _pending: int
    """Runs that wait on a stream."""

    @classmethod
    def of(cls, plan: Plan, runtime: Any) -> "ICudaEngine":
        graph, state = onnx.GraphProto.FromString(plan.graph), Current.get()
        constants = dict(plan.constants)
        made: ICudaEngine = cls.make(
            _plan=plan,
            # NvInferRuntime.h: an engine must not outlive its runtime; the bindings keep it (keep_alive).
            _runtime=runtime,
            _state=state,
            _program=Program(graph, constants, plan.opset, fold=True),
            _shapes=ShapeModel(graph, constants, plan.opset),
            _tensors={tensor.name: tensor for tensor in (*plan.inputs, *plan.outputs)},
            _ready=not (plan.stripped and plan.digests),
            _budget=plan.weight_bytes,
            _reserved=0 if plan.streaming else plan.weight_bytes,
            _contexts=0,
            _pending=0,
        )
        return made

    def __del__(self) -> None:
        if getattr(self, "_initialised", False):
            self._state.cuda.reserved -= self._reserved

    @property
    def _logger(self) -> ILogger:
        logger: ILogger = self._runtime.logger
        return logger

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._plan.profiles))

    @property
    def num_layers(self) -> int:
        return len(self._program.graph.node)

    @property
    def refittable(self) -> bool:
        return self._plan.refittable

    @property
    def hardware_compatibility_level(self) -> Any:
        return getattr(self._state.enum("HardwareCompatibilityLevel"), self._plan.compatibility)

    @property
    def profiling_verbosity(self) -> Any:
        return getattr(self._state.enum("ProfilingVerbosity"), self._plan.verbosity)

    def __getitem__(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[whole(index, "index")]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._state.enum("TensorIOMode")
        if name not in self._tensors:
            return modes.NONE
        return modes.INPUT if self._is_input(name) else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        tensor = self._tensors.get(expect(name, str, "name"))
        return getattr(self._state.enum("DataType"), tensor.kind if tensor else "FLOAT")

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._tensors[expect(name, str, "name")].shape)

    def get_tensor_location(self, name: str) -> Any:
        return self._state.enum("TensorLocation").DEVICE

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        return self._state.enum("TensorFormat").LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        """Least, usual and greatest shape of an input."""
        return [Dims(shape) for shape in self.ranges(name, whole(profile_index, "profile_index"))]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Most that the activations of any shape in the profile need."""
        profile = whole(profile_index, "profile_index")
        return self.scratch({t.name: self.ranges(t.name, profile)[2] for t in self._plan.inputs})

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2, range(self.num_optimization_profiles)))

    # --- weights ---

    @property
    def streamable_weights_size(self) -> int:
        return self._plan.weight_bytes if self._plan.streaming else 0

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return max(self._plan.sizes.values(), default=0) if self._plan.streaming else 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget if self._plan.streaming else 0

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        """NvInferRuntime.h setWeightStreamingBudgetV2. Python never hears that it was refused."""
        budget = whole(budget, "weight_streaming_budget_v2")
        if not self._plan.streaming or budget < 0:
            log(self._logger, "ERROR", "the engine streams no weights, or the budget is negative")
        elif self._contexts:
            log(self._logger, "ERROR", "the weights' budget can't be set while there are contexts")
        else:
            self._budget = min(budget, self._plan.weight_bytes)

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    # --- the rest ---

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return None if self._is_input(name) else self._plan.aliases.get(name)

    def is_debug_tensor(self, name: str) -> bool:
        return name in self._plan.debug

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext | None:
        strategies = self._state.enum("ExecutionContextAllocationStrategy")
        chosen = strategies.STATIC if strategy is None else expect(strategy, strategies, "strategy")
        if self._plan.streaming and not self._reserved:
            # "GPU memory for the weights is allocated" once their budget is known.
            if not self._state.cuda.reserve(self._budget):
                log(self._logger, "ERROR", f"OutOfMemory: requested size was {self._budget} bytes")
                return None
            self._reserved = self._budget
        # A context with memory of its own takes it now (ExecutionContextAllocationStrategy).
        own = 0 if chosen.name == "USER_MANAGED" else self.device_memory_size_v2
        if not self._state.cuda.reserve(own):
            log(self._logger, "ERROR", f"OutOfMemory: requested size was {own} bytes")
            return None
        self._contexts += 1
        return IExecutionContext.of(self, chosen.name, own)

    def create_engine_inspector(self) -> "EngineInspector":
        made: EngineInspector = EngineInspector.make(_engine=self)
        return made

    def streams(self) -> bool:
        """Whether weights come from the host at each run."""
        return self._plan.streaming and self._budget < self._plan.weight_bytes

    def ranges(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        shape = self._tensors[name].shape
        if not self._plan.profiles:
            return (shape, shape, shape)
        return self._plan.profiles[profile].get(name, (shape, shape, shape))

    def scratch(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """Memory for the activations of inputs of these shapes."""
        # NvInferRuntime.h setWeightStreamingBudgetV2: contexts then need more.
        streamed = self.weight_streaming_scratch_memory_size if self.streams() else 0
        return -(-(self._shapes.peak(shapes) + _WORKSPACE + streamed) // 256) * 256

    def _is_input(self, name: str) -> bool:
        return any(tensor.name == name for tensor in self._plan.inputs)


class EngineInspector(Bound):
    _engine: ICudaEngine

    def get_engine_information(self, format: Any) -> str:
        json_wanted = expect(format, Current.get().enum("LayerInformationFormat"), "format").name == "JSON"
        layers = [self._layer(index) for index in range(self._engine.num_layers)]
        if not json_wanted:
            return "\n".join(layer if isinstance(layer, str) else layer["Name"] for layer in layers)
        return json.dumps({"Layers": layers, "Bindings": list(self._engine._tensors)})

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        layer = self._layer(whole(layer_index, "layer_index"))
        json_wanted = expect(format, Current.get().enum("LayerInformationFormat"), "format").name == "JSON"
        return json.dumps(layer) if json_wanted or not isinstance(layer, str) else layer

    def _layer(self, index: int) -> Any:
        """A name, or more where the plan was built with DETAILED (NvInfer.h ProfilingVerbosity)."""
        node = self._engine._program.graph.node[index]
        verbosity = self._engine._plan.verbosity
        if verbosity != "DETAILED":
            return node.name if verbosity == "LAYER_NAMES_ONLY" else str(index)
        tensors = [[{"Name": name} for name in names if name] for names in (node.input, node.output)]
        return {
            "Name": node.name,
            "LayerType": "PluginV3" if node.domain else node.op_type,
            "Inputs": tensors[0],
            "Outputs": tensors[1],
            "TacticName": "fake",
            "StreamId": 0,
            "Metadata": f"[ONNX Layer: {node.name}]",
        }
