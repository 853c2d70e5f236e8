# SPDX-License-Identifier: Apache-2.0
"""One run of an engine: what was bound when it was enqueued, computed when its stream gets there."""

import ctypes
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from fake_tensorrt.binding import Dims, called
from fake_tensorrt.callbacks import IDebugListener, IProfiler
from fake_tensorrt.enums import KINDS, kind_name
from fake_tensorrt.plugin_nodes import reference, run_plugin
from fake_tensorrt.state import Current, MisuseError
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fake_tensorrt.engine import ICudaEngine

_SPOIL = 0xEE
_MOST_SPOILED = 1 << 20


@dataclass(frozen=True)
class Binding:
    """Where an input or output lies."""

    name: str
    address: int
    shape: tuple[int, ...]
    kind: str
    is_input: bool

    @property
    def piece(self) -> tuple[int, int]:
        return self.address, int(np.prod(self.shape)) * KINDS[self.kind].itemsize

    def view(self) -> NDArray[Any]:
        return view(self.address, self.shape, KINDS[self.kind], self.name)


@dataclass
class Life:
    """What outlives a context: its work may still wait, or have been recorded."""

    alive: bool = True
    pending: int = 0
    """Pieces of work that wait on a stream."""
    moving: list[int] = field(default_factory=list)
    """Streams on which the data of a profile wait."""
    changes: int = 0
    """How often what is bound was changed."""
    stream: int | None = None
    """Of the last run."""
    times: dict[str, float] = field(default_factory=dict)
    """Layers of the last run and their milliseconds."""

    def report(self, profiler: IProfiler, engine: "ICudaEngine") -> None:
        """Tell a profiler; layers have numbers for names where the plan has none (IProfiler)."""
        hidden = engine._plan.verbosity == "NONE"
        for index, (name, took) in enumerate(self.times.items()):
            called(profiler.report_layer_time, str(index) if hidden else name, took, otherwise=None)


@dataclass
class Run:
    """A run with shapes and addresses of now, whenever it happens."""

    engine: "ICudaEngine"
    life: Life
    bindings: list[Binding]
    scratch: tuple[int, int] | None

    def enqueue(self, stream: int, listener: IDebugListener | None, shown: set[str]) -> None:
        """Put the run on a stream; a listener sees the shown values meanwhile."""
        self._check_memory()
        self.life.stream = stream
        if not shown or listener is None:
            self._submit(stream, lambda: self._finish(self._begin(())))
            return
        if stream in self._cuda.capturing:
            raise MisuseError("values are looked at while a graph is captured")
        self._show(stream, listener, shown)

    def _show(self, stream: int, listener: IDebugListener, shown: set[str]) -> None:
        """NvInferRuntime.h IDebugListener: addresses are good within the callback only."""
        begun: list[Generator[tuple[str, NDArray[Any]], None, dict[str, NDArray[Any]]]] = []
        state = Current.get()
        names = [name for node in self.engine._program.graph.node for name in node.output if name in shown]
        shapes = {binding.name: binding.shape for binding in self.bindings if binding.is_input}
        values = self.engine._shapes.values(shapes)
        self._submit(stream, lambda: begun.append(self._begin(shown)))
        for name in names:
            shape, number = values[name]
            kind = kind_name(_dtype(number))
            piece = int(np.prod(shape)) * KINDS[kind].itemsize
            address = self._cuda.allocate(piece)

            def compute(
                name: str = name, address: int = address, shape: Any = shape, kind: str = kind
            ) -> None:
                found, array = next(begun[0])
                assert found == name
                view(address, shape, KINDS[kind], name)[...] = array

            self._submit(stream, compute)
            device, dtype = state.enum("TensorLocation").DEVICE, getattr(state.enum("DataType"), kind)
            arguments = address, device, dtype, Dims(shape), name, stream
            called(listener.process_debug_tensor, *arguments, otherwise=None)
            if self._cuda.queued[stream]:
                raise MisuseError(f"{name} is looked at without waiting: its memory is given back")
            self._cuda.free(address)
        self._submit(stream, lambda: self._finish(begun[0]))

    def _submit(self, stream: int, work: Callable[[], object]) -> None:
        captured = stream in self._cuda.capturing
        waits, changes = 0 if captured else 1, self.life.changes

        def run() -> None:
            self.life.pending -= waits
            self.engine._pending -= waits
            if not self.life.alive:
                raise MisuseError("a run begins after its context is gone")
            # Developer guide, CUDA graphs: a context of its own for each captured graph.
            if captured and self.life.changes != changes:
                raise MisuseError("a graph is launched after its context was bound to something else")
            self._check_memory()
            work()

        reads = tuple(binding.piece for binding in self.bindings if binding.is_input)
        writes = tuple(binding.piece for binding in self.bindings if not binding.is_input)
        writes += () if self.scratch is None else (self.scratch,)
        self._cuda.submit(stream, run, f"enqueue of {self.bindings[-1].name}", reads, writes)
        self.life.pending += waits
        self.engine._pending += waits

    def _begin(self, shown: Any) -> Generator[tuple[str, NDArray[Any]], None, dict[str, NDArray[Any]]]:
        if self.scratch is not None:
            # What activations leave there is nobody's.
            ctypes.memset(self.scratch[0], _SPOIL, min(self.scratch[1], _MOST_SPOILED))
        feeds = {binding.name: binding.view() for binding in self.bindings if binding.is_input}
        execute = Current.get().execute or _with_reference()
        return self.engine._program.steps(feeds, execute, shown)

    def _finish(self, steps: Generator[tuple[str, NDArray[Any]], None, dict[str, NDArray[Any]]]) -> None:
        results: dict[str, NDArray[Any]] = {}
        while not results:
            try:
                next(steps)
            except StopIteration as done:
                results = done.value
        for binding in self.bindings:
            if binding.is_input:
                continue
            array, target = results[binding.name], binding.view()
            if array.shape != target.shape or array.dtype != target.dtype:
                raise MisuseError(
                    f"{binding.name} is {array.dtype} {array.shape}, declared {target.dtype} {target.shape}"
                )
            if array.ctypes.data != target.ctypes.data:
                target[...] = array
        self.life.times = dict(self.engine._program.times)

    def _check_memory(self) -> None:
        """NvInferRuntime.h setTensorAddress: buffers "of sufficient size"; outputs overlap nothing else."""
        for binding in self.bindings:
            self._cuda.check(*binding.piece, binding.name)
        if self.scratch is not None:
            self._cuda.check(*self.scratch, "memory for activations")
        aliases = self.engine._plan.aliases
        taken = sorted((binding.piece, index) for index, binding in enumerate(self.bindings))
        if self.scratch is not None:
            taken = sorted([*taken, (self.scratch, -1)])
        end, furthest = 0, -1
        for (start, size), index in taken:
            pair = [None if each < 0 else self.bindings[each] for each in (furthest, index)]
            meets = start < end
            if start + size > end:
                end, furthest = start + size, index
            if not meets:
                continue
            if not _may_overlap(pair, aliases):
                names = [binding.name if binding else "memory for activations" for binding in pair]
                raise MisuseError(f"{names[0]} and {names[1]} overlap")

    @property
    def _cuda(self) -> Any:
        return self.engine._state.cuda


def _may_overlap(pair: list[Binding | None], aliases: dict[str, str]) -> bool:
    """Inputs may, and an output that a plugin writes into an input with whatever else is that input."""
    one, two = pair
    if one is None or two is None:
        return False
    if one.is_input and two.is_input:
        return True
    return one.is_input != two.is_input and (two if one.is_input else one).name in aliases


def view(address: int, shape: tuple[int, ...], dtype: Any, name: str) -> NDArray[Any]:
    """An array on the card's memory, which must be there."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    Current.get().cuda.check(address, size, name)
    block = (ctypes.c_uint8 * max(1, size)).from_address(address)
    return np.frombuffer(block, np.uint8, size).view(dtype).reshape(shape)


def _dtype(number: int) -> np.dtype[Any]:
    found: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(number)
    return found


@cache
def _with_reference() -> Callable[..., dict[str, NDArray[Any]]]:
    implementation = reference()
    return lambda node, values: run_plugin(implementation, node, values)
