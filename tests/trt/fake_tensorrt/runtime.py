# SPDX-License-Identifier: Apache-2.0
"""The runtime: from bytes to an engine, or to None and a line in the log."""

from typing import Any

import onnx
from fake_tensorrt import plan as plans
from fake_tensorrt.binding import Bound, called, expect
from fake_tensorrt.callbacks import ILogger, IStreamReader, IStreamReaderV2, read_all, read_once
from fake_tensorrt.engine import ICudaEngine
from fake_tensorrt.plan import HEAD, Plan
from fake_tensorrt.plugin_nodes import DOMAIN
from fake_tensorrt.state import Current, MisuseError, State, log


class Runtime(Bound):
    def __init__(self, logger: ILogger) -> None:
        self._initialised = True
        self._logger = expect(logger, ILogger, "logger")
        # The real one logs CUDA error 35 and crashes when it is freed (found with the lean runtime).
        if Current.get().gpu is None:
            raise MisuseError("a Runtime without a CUDA device crashes the process")
        self._host_code = False

    @property
    def logger(self) -> ILogger:
        return self._logger

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self._host_code = expect(allowed, bool, "engine_host_code_allowed")

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        state, plan = Current.get(), plans.read(_content(serialized_engine))
        if plan is None:
            return self._refuse("Magic tag does not match, or the plan is truncated")
        if reason := self._mismatch(plan, state):
            return self._refuse(reason)
        missing = sorted(key for key in _plugins_of(plan) if key not in state.plugins)
        if missing:
            return self._refuse(f"getPluginCreator could not find plugin {missing[0][0]}")
        # Weights that are streamed stay in host memory until a context is made.
        if not plan.streaming and not state.cuda.reserve(plan.weight_bytes):
            return self._refuse(f"OutOfMemory: requested size was {plan.weight_bytes} bytes")
        return ICudaEngine.of(plan, self)

    def _mismatch(self, plan: Plan, state: State) -> str:
        """Why a plan of others can't run here (NvInfer.h BuilderFlag::kVERSION_COMPATIBLE and
        HardwareCompatibilityLevel); empty if it can."""
        if "VERSION_COMPATIBLE" in plan.flags:
            # NvInferRuntime.h setEngineHostCodeAllowed.
            if not self._host_code:
                return "the plan holds host code, which is not allowed"
            if plan.version.split(".")[0] != state.version.split(".")[0]:
                return f"The engine plan file is of version {plan.version}, not {state.version}"
        elif plan.version != state.version:
            return f"The engine plan file is of version {plan.version}, not {state.version}"
        return "" if _runs_here(plan) else "The engine plan file was generated on an incompatible device"

    def _refuse(self, reason: str) -> None:
        log(self._logger, "ERROR", f"deserializeCudaEngine: {reason}")


def _content(source: Any) -> bytes:
    """All bytes of a plan, or fewer if a reader has no more."""
    state = Current.get()
    if isinstance(source, IStreamReaderV2) and state.since(10, 7):
        start = state.enum("SeekPosition").SET
        if not called(source.seek, 0, start, otherwise=False):
            return b""
        head = read_all(source, HEAD)
        return head + read_all(source, plans.body_length(head))
    if isinstance(source, IStreamReader) and not state.since(11, 0):
        head = read_once(source, HEAD)
        return head + read_once(source, plans.body_length(head))
    return bytes(memoryview(source))


def _runs_here(plan: Plan) -> bool:
    gpu = Current.get().gpu
    # There is neither a builder nor a runtime without one.
    assert gpu is not None
    assert plan.gpu is not None
    return {
        "NONE": plan.gpu.name == gpu.name and plan.gpu.capability == gpu.capability,
        "AMPERE_PLUS": gpu.capability >= (8, 0),
        "SAME_COMPUTE_CAPABILITY": plan.gpu.capability == gpu.capability,
    }[plan.compatibility]


def _plugins_of(plan: Plan) -> set[tuple[str, str, str]]:
    graph = onnx.GraphProto.FromString(plan.graph)
    return {(node.op_type, "1", DOMAIN) for node in graph.node if node.domain == DOMAIN}
