# SPDX-License-Identifier: Apache-2.0
"""The runtime, engines and what refits them."""

from pathlib import Path
from typing import Any

import onnx
from fake_tensorrt import plan as plans
from fake_tensorrt.context import IExecutionContext
from fake_tensorrt.enums import (
    DataType,
    ExecutionContextAllocationStrategy,
    SeekPosition,
    TensorIOMode,
    TensorLocation,
)
from fake_tensorrt.plan import Plan
from fake_tensorrt.program import Program, constants_of
from fake_tensorrt.state import Current, MisuseError, log

_ALL = 1 << 40


class Runtime:
    def __init__(self, logger: Any) -> None:
        # The real one logs CUDA error 35 and crashes when it is freed (found with the lean runtime).
        if Current.get().gpu is None:
            raise MisuseError("a Runtime without a CUDA device crashes the process")
        self._logger = logger

    def deserialize_cuda_engine(self, source: Any) -> "ICudaEngine | None":
        plan = plans.read(_content(source))
        state = Current.get()
        reason = None
        if plan is None:
            reason = "Magic tag does not match, or the plan is truncated"
        elif plan.version != state.version:
            reason = f"The engine plan file is of version {plan.version}, not {state.version}"
        elif not _runs_here(plan):
            reason = "The engine plan file was generated on an incompatible device"
        if plan is None or reason:
            log(self._logger, "ERROR", str(reason))
            return None
        missing = [key for key in _plugins_of(plan) if key not in state.plugins]
        if missing:
            log(self._logger, "ERROR", f"getPluginCreator could not find plugin {missing[0][0]}")
            return None
        return ICudaEngine(plan, self._logger)


def _content(source: Any) -> bytes:
    if hasattr(source, "seek") and hasattr(source, "read"):
        source.seek(0, SeekPosition.SET)
        pieces = []
        # IStreamReaderV2: asked again until it has all, or nothing comes (pyCore.cpp PyStreamReaderV2).
        while piece := bytes(source.read(1 << 16, 1)):
            pieces.append(piece)
        return b"".join(pieces)
    if hasattr(source, "read"):
        # IStreamReader: what comes short ends the plan (pyCore.cpp 10.3 PyStreamReader).
        head = bytes(source.read(48))
        return head + bytes(source.read(int.from_bytes(head[40:48], "little")))
    return bytes(source)


def _runs_here(plan: Plan) -> bool:
    gpu = Current.get().gpu
    if gpu is None or plan.gpu is None:
        return False
    same = plan.gpu.name == gpu.name and plan.gpu.capability == gpu.capability
    return {0: same, 1: gpu.capability >= (8, 0), 2: plan.gpu.capability == gpu.capability}[
        plan.compatibility
    ]


def _plugins_of(plan: Plan) -> set[tuple[str, str, str]]:
    graph = onnx.GraphProto.FromString(plan.graph)
    return {(node.op_type, "1", node.domain) for node in graph.node if node.domain}


class ICudaEngine:
    def __init__(self, plan: Plan, logger: Any) -> None:
        self.plan, self.logger = plan, logger
        graph = onnx.GraphProto.FromString(plan.graph)
        self.program = Program(graph, dict(plan.constants), plan.opset)
        self.ready = not plan.stripped
        self._tensors = {name: (shape, dtype, True) for name, shape, dtype in plan.inputs}
        self._tensors |= {name: (shape, dtype, False) for name, shape, dtype in plan.outputs}
        self._budget = plan.weight_bytes
        self.contexts = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self.plan.profiles))

    @property
    def num_layers(self) -> int:
        return len(self.program.graph.node)

    @property
    def refittable(self) -> bool:
        return self.plan.refittable

    @property
    def streamable_weights_size(self) -> int:
        return self.plan.weight_bytes if self.plan.streaming else 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        # NvInferRuntime.h setWeightStreamingBudgetV2: not while contexts exist.
        if self.contexts:
            raise MisuseError("the weights' budget is set while contexts exist")
        if self.plan.streaming and 0 <= budget <= self.plan.weight_bytes:
            self._budget = budget

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.plan.weight_bytes // 2

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self._tensors[name][2] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._tensors[name][1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][0]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        shape = self._tensors[name][0]
        if not self.plan.profiles:
            return [shape] * 3
        return list(self.plan.profiles[profile_index].get(name, (shape, shape, shape)))

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Deterministic, and larger for larger profiles; a real one depends on kernels."""
        profile = self.plan.profiles[profile_index] if self.plan.profiles else {}
        rows = max((max(ranges[2], default=1) for ranges in profile.values()), default=1)
        return 4096 * max(1, rows // 64)

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2, range(self.num_optimization_profiles)))

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return None if self._tensors[name][2] else self.plan.aliases.get(name)

    def is_debug_tensor(self, name: str) -> bool:
        return name in self.plan.debug

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext:
        if not self.ready:
            raise MisuseError("a stripped plan is used before its weights are refitted")
        self.contexts += 1
        return IExecutionContext(self, strategy)

    def create_engine_inspector(self) -> "EngineInspector":
        return EngineInspector(self)


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        import json

        names = [node.name for node in self._engine.program.graph.node]
        return json.dumps({"Layers": names, "Bindings": [name for name, *_ in self._engine.plan.inputs]})


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        if not engine.plan.refittable:
            raise MisuseError("a Refitter of an engine that was not built for refitting")
        self.engine, self.logger = engine, logger
        self.weights: dict[str, Any] = {}

    def refit_cuda_engine(self) -> bool:
        missing = self.get_missing_weights()
        if missing:
            log(self.logger, "ERROR", f"missing weights: {missing[0]}")
            return False
        self.engine.program.constants.update(self.weights)
        self.engine.ready = True
        return True

    def get_missing_weights(self) -> list[str]:
        wanted = {tensor.name for tensor in self.engine.program.graph.initializer}
        return sorted(wanted - self.weights.keys() - self.engine.program.constants.keys())


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter, self._logger = refitter, logger

    def refit_from_file(self, model: str) -> bool:
        path = Path(model)
        if not path.is_file():
            log(self._logger, "ERROR", f"Failed to open file: {model}")
            return False
        graph = onnx.load(path, load_external_data=False).graph
        self._refitter.weights = constants_of(graph, str(path.parent))
        return True
