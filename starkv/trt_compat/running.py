# SPDX-License-Identifier: Apache-2.0
"""Plans: opening them, their weights, and what they say of their tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from starkv.errors import EngineError
from starkv.trt_compat.module import TensorRT, TensorRTLog, make_logger
from starkv.trt_compat.plan_reader import plan_reader
from starkv.trt_compat.version import ALIASED_TENSORS

if TYPE_CHECKING:
    import tensorrt as trt

ALIGNMENT = 256
"""Of every address (NvInferRuntime.h, setTensorAddress)."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a plan."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    shape: Shape
    """−1 where it is free."""
    ranges: tuple[tuple[Shape, Shape, Shape], ...]
    """Of an input: least, usual and greatest shape in each profile."""


class Runtime:
    """Opens plans. There must be a GPU: without one TensorRT crashes when this goes."""

    def __init__(self, tensorrt: TensorRT) -> None:
        self.tensorrt, self.log = tensorrt, TensorRTLog()
        # Must live as long as anything that was made with it.
        self.logger = make_logger(tensorrt, self.log)
        self._runtime: trt.Runtime = tensorrt.module.Runtime(self.logger)

    def open(self, path: Path, refit_from: Path | None = None) -> "Plan":
        """Read a plan.

        Args:
            path: its file.
            refit_from: the lowered graph that the weights of a stripped plan come from.

        Raises:
            EngineError: TensorRT can't, or the weights don't fit.
        """
        with plan_reader(self.tensorrt, path) as reader:
            engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(reader)
        if engine is None:
            raise EngineError(
                f"TensorRT {self.tensorrt.full_version} can't open {path}: {self.log.take()}; build it again "
                "on this machine"
            )
        if refit_from is not None:
            self._refit(engine, path, refit_from)
        return Plan(self, path.name, engine)

    def _refit(self, engine: "trt.ICudaEngine", path: Path, graph: Path) -> None:
        module = self.tensorrt.module
        refitter: trt.Refitter = module.Refitter(engine, self.logger)
        parser: trt.OnnxParserRefitter = module.OnnxParserRefitter(refitter, self.logger)
        if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
            raise EngineError(
                f"the weights of {graph.name} do not fit {path.name}: {self.log.take()}; build it again"
            )


class Plan:
    """An opened plan."""

    def __init__(self, runtime: Runtime, name: str, engine: "trt.ICudaEngine") -> None:
        self.name, self._runtime, self._engine = name, runtime, engine
        self._module = runtime.tensorrt.module
        self.tensors = {info.name: info for info in self._describe()}

    @property
    def engine(self) -> "trt.ICudaEngine":
        return self._engine

    @property
    def runtime(self) -> Runtime:
        return self._runtime

    @property
    def profiles(self) -> int:
        return int(self._engine.num_optimization_profiles)

    @property
    def streamable_bytes(self) -> int:
        """Weights that may stay in host memory; 0 unless the plan was built for that."""
        return int(self._engine.streamable_weights_size)

    @property
    def streams(self) -> bool:
        """Whether weights come from the host at each run, which no CUDA graph can hold."""
        return int(self._engine.weight_streaming_budget_v2) < self.streamable_bytes

    def stream_weights(self, budget: int) -> None:
        """Say how much of the weights lies on the device; before any context is made.

        Args:
            budget: bytes, at most :attr:`streamable_bytes`.

        Raises:
            EngineError: TensorRT refuses it.
        """
        self._engine.weight_streaming_budget_v2 = budget
        if int(self._engine.weight_streaming_budget_v2) != budget:
            raise EngineError(
                f"TensorRT refuses {budget} bytes for the weights of {self.name}: {self._runtime.log.take()}"
            )

    def scratch_bytes(self, profile: int) -> int:
        """Device memory for the activations of a profile."""
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def check_aliases(self, aliases: Mapping[str, str]) -> None:
        """Compare which outputs share an input's memory with what TensorRT says, where it says so.

        Raises:
            EngineError: it says something else.
        """
        if self._runtime.tensorrt.version < ALIASED_TENSORS:
            return
        for info in self.tensors.values():
            if info.is_input:
                continue
            said = self._engine.get_aliased_input_tensor(info.name)
            if said and aliases.get(info.name) != said:
                raise EngineError(
                    f"{self.name}: TensorRT wants {info.name} in the memory of {said}; build it again"
                )

    def context(self, profile: int, stream: int) -> "trt.IExecutionContext":
        """A context of one profile, without memory for activations.

        Raises:
            EngineError: TensorRT can't make it.
        """
        if not 0 <= profile < self.profiles:
            raise EngineError(f"{self.name} has no profile {profile}; build it again")
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        context: trt.IExecutionContext | None = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise EngineError(
                f"TensorRT can't run profile {profile} of {self.name}: {self._runtime.log.take()}"
            )
        return context

    def _describe(self) -> list[TensorInfo]:
        engine, infos = self._engine, []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == self._module.TensorIOMode.INPUT
            ranges: tuple[tuple[Shape, Shape, Shape], ...] = ()
            if is_input:
                ranges = tuple(self._range(name, profile) for profile in range(self.profiles))
            dtype = numpy_dtype(self._module, engine.get_tensor_dtype(name))
            infos.append(TensorInfo(name, is_input, dtype, tuple(engine.get_tensor_shape(name)), ranges))
        return infos

    def _range(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        least, usual, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(usual), tuple(most)


def numpy_dtype(module: Any, dtype: Any) -> np.dtype[Any]:
    """A TensorRT type as numpy's.

    Raises:
        EngineError: starkv has no such tensors.
    """
    kinds: dict[Any, Any] = {
        module.DataType.FLOAT: np.float32,
        module.DataType.HALF: np.float16,
        module.DataType.BF16: ml_dtypes.bfloat16,
        module.DataType.INT32: np.int32,
        module.DataType.INT64: np.int64,
        module.DataType.BOOL: np.bool_,
    }
    if dtype not in kinds:
        raise EngineError(f"the engine has a tensor of type {dtype}; build it again")
    found: np.dtype[Any] = np.dtype(kinds[dtype])
    return found
