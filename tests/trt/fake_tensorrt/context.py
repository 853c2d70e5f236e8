# SPDX-License-Identifier: Apache-2.0
"""Execution contexts: where most rules apply."""

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from fake_tensorrt.enums import ExecutionContextAllocationStrategy, TensorLocation
from fake_tensorrt.plugin_nodes import reference, run_plugin
from fake_tensorrt.state import Current, MisuseError, log
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fake_tensorrt.running import ICudaEngine

_ALIGNMENT = 256
_USER_MANAGED = ExecutionContextAllocationStrategy.USER_MANAGED


class IExecutionContext:
    def __init__(self, engine: "ICudaEngine", strategy: ExecutionContextAllocationStrategy) -> None:
        self.engine, self._strategy = engine, strategy
        self.active_optimization_profile = 0
        self._profile_set = engine.num_optimization_profiles == 1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None
        self._debug: Any = None
        self.runs = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return False
        if not stream_handle:
            raise MisuseError("a profile is set on the default stream")
        self.active_optimization_profile, self._profile_set = profile_index, True
        # NvInferRuntime.h setOptimizationProfileAsync: shapes must be set again.
        self._shapes.clear()
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        # NvInferRuntime.h (10.16) setDeviceMemoryV2: 256 bytes aligned, at least the profile's size.
        if self._strategy != _USER_MANAGED:
            raise MisuseError("memory is given to a context that has its own")
        if memory % _ALIGNMENT:
            raise MisuseError("memory for activations must be aligned to 256 bytes")
        needed = self.engine.get_device_memory_size_for_profile_v2(self.active_optimization_profile)
        if size < needed:
            raise MisuseError(f"{size} bytes for activations, {needed} are needed")
        Current.get().cuda.check(memory, size, "memory for activations")
        self._scratch = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        if len(shape) != len(least) or not all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ):
            log(self.engine.logger, "ERROR", f"{name}: {shape} is outside of the profile {least} to {most}")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._names():
            return False
        # NvInferRuntime.h (10.16) setTensorAddress: "at least 256-byte alignment".
        if memory % _ALIGNMENT:
            raise MisuseError(f"{name}: an address must be aligned to 256 bytes")
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name, self.engine.get_tensor_shape(name))

    def infer_shapes(self) -> list[str]:
        return [name for name, *_ in self.engine.plan.inputs if name not in self._shapes]

    def set_debug_listener(self, listener: Any) -> bool:
        self._debug = listener
        return True

    def set_all_tensors_debug_state(self, flag: bool) -> bool:
        self._debug_on = flag
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        state, plan = Current.get(), self.engine.plan
        if not self._profile_set:
            raise MisuseError("no profile is set, and the engine has several")
        if self._strategy == _USER_MANAGED and self._scratch is None:
            raise MisuseError("a context without memory for its activations")
        for name in self._names():
            # NvInferRuntime.h enqueueV3: "each input must have a non-null address and each output".
            if not self._addresses.get(name):
                raise MisuseError(f"{name} has no address")
        for name, shape, _ in plan.inputs:
            if name not in self._shapes and -1 in shape:
                raise MisuseError(f"{name} has no shape")
        for output, source in plan.aliases.items():
            # NvInferRuntime.h getAliasedInputTensor, docs of aliased plugin I/O: one address for both.
            if output in self._addresses and self._addresses[output] != self._addresses[source]:
                raise MisuseError(f"{output} does not share the memory of {source}")
        # NvInferRuntime.h enqueueV3: streaming weights can't be captured.
        if plan.streaming and stream_handle in state.cuda.capturing:
            raise MisuseError("a graph is captured while weights are streamed")
        if stream_handle in state.cuda.capturing and not self.runs:
            raise MisuseError("a graph is captured before the shapes have run once")
        self.runs += 1
        state.cuda.submit(stream_handle, self._work(), f"enqueue of {plan.outputs[0][0]}")
        return True

    def _work(self) -> Callable[[], None]:
        """The run with shapes and addresses of now, whenever it happens."""
        plan, program, state = self.engine.plan, self.engine.program, Current.get()
        addresses = dict(self._addresses)
        shapes = {name: self._shapes.get(name, shape) for name, shape, _ in plan.inputs}
        dtypes = {name: dtype.value for name, _, dtype in (*plan.inputs, *plan.outputs)}
        scratch, debug = self._scratch, self._debug
        execute = state.execute or _with_reference()

        def run() -> None:
            if scratch is not None:
                # What activations leave there is nobody's.
                state.cuda.check(*scratch, "memory for activations")
                ctypes.memset(scratch[0], 0xEE, scratch[1])
            feeds = {name: view(addresses[name], shape, dtypes[name], name) for name, shape in shapes.items()}
            results = program.run(feeds, execute)
            for name, array in results.items():
                target = view(addresses[name], array.shape, dtypes[name], name)
                if array.ctypes.data != target.ctypes.data:
                    if array.dtype != target.dtype:
                        raise MisuseError(f"{name} is {array.dtype}, declared {target.dtype}")
                    target[...] = array
            if debug is not None:
                for name in plan.debug:
                    if name in program.seen:
                        array = np.ascontiguousarray(program.seen[name])
                        kind = next(k for k in type_of() if k.value == array.dtype)
                        debug.process_debug_tensor(
                            array.ctypes.data, TensorLocation.DEVICE, kind, array.shape, name, 1
                        )

        program.watched = set(plan.debug) if debug is not None else set()
        return run

    def _names(self) -> list[str]:
        return [name for name, *_ in (*self.engine.plan.inputs, *self.engine.plan.outputs)]


def type_of() -> list[Any]:
    from fake_tensorrt.enums import DataType

    return list(DataType)


def view(address: int, shape: tuple[int, ...], dtype: Any, name: str) -> NDArray[Any]:
    """An array on the card's memory, which must be there."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    Current.get().cuda.check(address, size, name)
    block = (ctypes.c_uint8 * max(1, size)).from_address(address)
    return np.frombuffer(block, np.uint8, size).view(dtype).reshape(shape)


def _with_reference() -> Callable[..., dict[str, Any]]:
    implementation = reference()
    return lambda node, values: run_plugin(implementation, node, values)
