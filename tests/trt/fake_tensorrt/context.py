# SPDX-License-Identifier: Apache-2.0
"""Execution contexts: what is bound before a run, and when a run may begin.

What TensorRT checks itself it answers with False and a line in its log. What it leaves undefined fails the
test.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fake_tensorrt.binding import Bound, Dims, expect, whole
from fake_tensorrt.callbacks import IDebugListener, IProfiler
from fake_tensorrt.run import Binding, Life, Run, view
from fake_tensorrt.shapes import ShapeError
from fake_tensorrt.state import Current, MisuseError, State, log
from fake_tensorrt.use_rules import check_scratch, check_use, unready

if TYPE_CHECKING:
    from fake_tensorrt.engine import ICudaEngine

__all__ = ["IExecutionContext", "view"]

ALIGNMENT = 256
Shape = tuple[int, ...]


class IExecutionContext(Bound):
    _engine: "ICudaEngine"
    _strategy: str
    _own: int
    """Bytes of memory for activations that the context has itself."""
    _state: State
    _profile: int
    _chosen: bool
    """Whether the profile was chosen, or is the only one."""
    _shapes: dict[str, Shape]
    _addresses: dict[str, int]
    _scratch: tuple[int, int] | None
    _partition: dict[str, Shape]
    """Shapes that the memory was measured for, instead of for the whole profile."""
    _settled: bool
    """Whether the shapes of now have run once."""
    _listener: IDebugListener | None
    _shown: set[str]
    _profiler: IProfiler | None
    _emits: bool
    _life: Life

    @classmethod
    def of(cls, engine: "ICudaEngine", strategy: str, own: int) -> "IExecutionContext":
        made: IExecutionContext = cls.make(
            _engine=engine,
            _strategy=strategy,
            _own=own,
            _state=Current.get(),
            _profile=0,
            _chosen=engine.num_optimization_profiles == 1,
            _shapes={},
            _addresses={},
            _scratch=None,
            _partition={},
            _settled=False,
            _listener=None,
            _shown=set(),
            _profiler=None,
            _emits=True,
            _life=Life(),
        )
        return made

    def __del__(self) -> None:
        if not getattr(self, "_initialised", False):
            return
        if self._life.pending:
            Current.violations.append("a context goes while its work is queued")
        self._life.alive = False
        self._engine._contexts -= 1
        self._state.cuda.reserved -= self._own

    @property
    def engine(self) -> "ICudaEngine":
        return self._engine

    # --- before a run ---

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """NvInferRuntime.h setOptimizationProfileAsync: shapes must be set again.

        Raises:
            RuntimeError: there is no such profile (pyCore.cpp context_set_optimization_profile_async).
        """
        if not 0 <= whole(profile_index, "profile_index") < self._engine.num_optimization_profiles:
            log(self._engine._logger, "ERROR", f"there is no optimization profile {profile_index}")
            raise RuntimeError("Error in set optimization profile async.")
        stream = whole(stream_handle, "stream_handle")
        if not stream:
            raise MisuseError("a profile is set on the default stream")
        # "cudaMemcpyAsyncs may be enqueued": whoever runs on another stream must wait for them.
        moving = self._life.moving
        self._state.cuda.submit(stream, lambda: moving.remove(stream), "a profile's data")
        moving.append(stream)
        self._profile, self._chosen = profile_index, True
        self._shapes.clear()
        self._settled = False
        self._life.changes += 1
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        """NvInferRuntime.h (10.16) setDeviceMemoryV2: aligned, and large enough."""
        if self._strategy != "USER_MANAGED":
            raise MisuseError("memory is given to a context that has its own")
        memory, size = whole(memory, "memory"), whole(size, "size")
        if memory % ALIGNMENT:
            raise MisuseError("memory for activations must be aligned to 256 bytes")
        self._state.cuda.check(memory, size, "memory for activations")
        self._life.changes += self._scratch != (memory, size)
        self._scratch = memory, size
        check_scratch(self)

    def update_device_memory_size_for_shapes(self) -> int:
        """NvInferRuntime.h updateDeviceMemorySizeForShapes: 0 where a shape is missing."""
        if self.infer_shapes():
            return 0
        self._partition = dict(self._shapes)
        return self._engine.scratch(self._all_shapes())

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if not isinstance(shape, tuple | list | Dims):
            raise TypeError(f"incompatible function arguments: shape is {shape!r}")
        sizes = tuple(Dims(shape))
        if name not in self._inputs():
            return self._refuse(f"setInputShape: {name} is no input")
        # NvInferRuntime.h IOptimizationProfile: "a runtime error" for shapes outside of the profile.
        least, _, most = self._engine.ranges(name, self._profile)
        inside = len(sizes) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, sizes, most, strict=True)
        )
        if not inside:
            return self._refuse(f"{name}: {sizes} is outside of the profile {least} to {most}")
        changed = self._shapes.get(name) != sizes
        self._settled = self._settled and not changed
        self._life.changes += changed
        self._shapes[name] = sizes
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        address = whole(memory, "memory")
        if name not in self._engine._tensors:
            return self._refuse(f"setTensorAddress: there is no tensor {name}")
        # NvInferRuntime.h (10.16) setTensorAddress: "at least 256-byte alignment".
        if address % ALIGNMENT:
            raise MisuseError(f"{name}: an address must be aligned to 256 bytes")
        self._life.changes += self._addresses.get(name) != address
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> Dims:
        """−1 where a size is not known yet."""
        if name in self._shapes:
            return Dims(self._shapes[name])
        if name in self._inputs() or self.infer_shapes():
            return self._engine.get_tensor_shape(name)
        return Dims(self._output_shapes()[name])

    def infer_shapes(self) -> list[str]:
        """Inputs without a shape.

        Raises:
            RuntimeError: shapes contradict each other.
        """
        missing = [name for name, tensor in self._inputs().items() if -1 in tensor.shape]
        missing = [name for name in missing if name not in self._shapes]
        if not missing:
            try:
                self._output_shapes()
            except ShapeError as error:
                raise RuntimeError("infer_shapes error code: -1") from error
        return missing

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    # --- looking at a run ---

    def set_debug_listener(self, listener: IDebugListener) -> bool:
        self._listener = expect(listener, IDebugListener, "listener")
        return True

    def get_debug_listener(self) -> IDebugListener | None:
        return self._listener

    def set_tensor_debug_state(self, name: str, flag: bool) -> bool:
        """NvInferRuntime.h setTensorDebugState: only of tensors that were marked for the build."""
        if name not in self._engine._plan.debug:
            return self._refuse(f"setTensorDebugState: {name} was not marked")
        (self._shown.add if expect(flag, bool, "flag") else self._shown.discard)(name)
        return True

    def set_all_tensors_debug_state(self, flag: bool) -> bool:
        self._shown = set(self._engine._plan.debug) if expect(flag, bool, "flag") else set()
        return True

    def get_debug_state(self, name: str) -> bool:
        return name in self._shown

    @property
    def profiler(self) -> IProfiler | None:
        return self._profiler

    @profiler.setter
    def profiler(self, profiler: IProfiler) -> None:
        self._profiler = expect(profiler, IProfiler, "profiler")

    @property
    def enqueue_emits_profile(self) -> bool:
        return self._emits

    @enqueue_emits_profile.setter
    def enqueue_emits_profile(self, emits: bool) -> None:
        self._emits = expect(emits, bool, "enqueue_emits_profile")

    def report_to_profiler(self) -> bool:
        """NvInferRuntime.h reportToProfiler: false without a profiler, and while a graph is captured."""
        if self._profiler is None or self._life.stream is None or self._state.cuda.capturing:
            return self._refuse("reportToProfiler: there is nothing to report, or a graph is captured")
        if not self._emits:
            self._state.cuda.synchronize(self._life.stream)
            self._life.report(self._profiler, self._engine)
        return True

    # --- a run ---

    def execute_async_v3(self, stream_handle: int) -> bool:
        """NvInferRuntime.h (10.16) enqueueV3."""
        stream = whole(stream_handle, "stream_handle")
        if reason := next(unready(self), ""):
            return self._refuse(f"enqueueV3: {reason}")
        check_use(self, stream)
        capturing = stream in self._state.cuda.capturing
        if capturing and self._profiler is not None and self._emits:
            return self._refuse("enqueueV3: layers can't be timed while a graph is captured")
        shapes = self._all_shapes() | self._output_shapes()
        shown = self._shown if self._listener is not None else set()
        run = Run(self._engine, self._life, [*self._bindings(shapes)], self._scratch)
        run.enqueue(stream, self._listener, shown)
        self._settled = True
        if self._profiler is not None and self._emits:
            # "enqueueV3 will be synchronous" (setEnqueueEmitsProfile).
            self._state.cuda.synchronize(stream)
            self._life.report(self._profiler, self._engine)
        return True

    def _bindings(self, shapes: dict[str, Shape]) -> Iterator[Binding]:
        plan = self._engine._plan
        for tensor in (*plan.inputs, *plan.outputs):
            name = tensor.name
            yield Binding(name, self._addresses[name], shapes[name], tensor.kind, tensor in plan.inputs)

    def _inputs(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._engine._plan.inputs}

    def _all_shapes(self) -> dict[str, Shape]:
        return {name: self._shapes.get(name, tensor.shape) for name, tensor in self._inputs().items()}

    def _output_shapes(self) -> dict[str, Shape]:
        return self._engine._shapes.outputs(self._all_shapes())

    def _refuse(self, reason: str) -> bool:
        log(self._engine._logger, "ERROR", reason)
        return False
