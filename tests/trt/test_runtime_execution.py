# SPDX-License-Identifier: Apache-2.0
"""Plans and their runs: what would be garbage or a crash is refused before TensorRT sees it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import install
from fake_tensorrt.callbacks import IStreamReader, IStreamReaderV2
from fake_tensorrt.context import IExecutionContext
from fake_tensorrt.engine import ICudaEngine
from fake_tensorrt.state import State
from small_engines import ATTENDING_SHAPES, CHAINED_SHAPES, Small, attending, chained, trt
from small_plans import opened, ready, room
from trt_engines import plugin_library

from starkv.errors import EngineError
from starkv.trt_compat import plan_reader
from starkv.trt_compat.execution import Execution
from starkv.trt_compat.running import Plan, numpy_dtype

ALIASES = {"present_k": "past_k", "present_v": "past_v"}
ROWS, CAPACITY = 4, 64


@pytest.fixture
def plan(chain: Small, tmp_path: Path) -> Plan:
    return opened(chain, tmp_path)


@pytest.fixture
def run(chain: Small, plan: Plan) -> Execution:
    """``y = sqrt(x * 4) + 1`` of three numbers, bound."""
    execution = ready(chain, plan)
    execution.bind("x", room(chain, "x"), (3,))
    execution.bind("y", room(chain, "y"), (3,))
    return execution


@pytest.fixture
def attending_run(attention: Small, tmp_path: Path) -> Execution:
    """One KVAttention, bound."""
    execution = ready(attention, opened(attention, tmp_path), ALIASES)
    shapes = {"q": (1, ROWS, 128), "k": (1, ROWS, 64), "v": (1, ROWS, 64), "kv_len": (1,)}
    for name, shape in shapes.items():
        execution.bind(name, room(attention, name), shape)
    for name in ("k", "v"):
        cache = room(attention, f"past_{name}")
        execution.bind(f"past_{name}", cache, (1, 1, CAPACITY, 64))
        execution.bind(f"present_{name}", cache, (1, 1, CAPACITY, 64))
    execution.bind("out", room(attention, "out"), (1, ROWS, 128))
    return execution


def test_a_plan_says_what_goes_in_and_out(plan: Plan) -> None:
    x, y = plan.tensors["x"], plan.tensors["y"]
    assert (x.is_input, x.dtype, x.shape, x.ranges) == (True, np.float32, (-1,), (((1,), (3,), (64,)),))
    assert (y.is_input, y.dtype, y.ranges) == (False, np.float32, ())
    assert (plan.name, plan.profiles, plan.streamable_bytes) == ("small.plan", 1, 0)


def test_a_run(chain: Small, run: Execution) -> None:
    chain.put("x", np.array([1, 4, 9], np.float32))
    run.enqueue()
    assert list(chain.get("y", (3,))) == [3, 5, 7]


def test_a_run_of_other_shapes(chain: Small, run: Execution) -> None:
    run.enqueue()
    run.bind("x", room(chain, "x"), (2,))
    run.bind("y", room(chain, "y"), (2,))
    chain.put("x", np.array([16, 25], np.float32))
    run.enqueue()
    assert list(chain.get("y", (2,))) == [9, 11]


WRONG: dict[str, tuple[Callable[[Execution, Small], object], str]] = {
    "no such tensor": (lambda run, small: run.bind("z", 256), "has no tensor z"),
    "null": (lambda run, small: run.bind("x", 0, (3,)), "x lies at 0x0, no multiple of 256"),
    "alignment": (lambda run, small: run.bind("x", room(small, "x") + 4, (3,)), "no multiple of 256"),
    "too large": (lambda run, small: run.bind("x", room(small, "x"), (65,)), r"\[65\].*\[1\] to \[64\]"),
    "empty": (lambda run, small: run.bind("x", room(small, "x"), (0,)), r"x is \[0\]"),
    "rank": (lambda run, small: run.bind("x", room(small, "x"), (1, 3)), r"x is \[1, 3\]"),
    "no shape": (lambda run, small: run.bind("x", room(small, "x")), r"x is \[\]"),
}


@pytest.mark.parametrize(("act", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_not_bound(
    chain: Small, run: Execution, act: Callable[[Execution, Small], object], reason: str
) -> None:
    with pytest.raises(EngineError, match=f"small.plan.*{reason}"):
        act(run, chain)
    run.enqueue()
    chain.cuda.synchronize(chain.stream)


def test_every_tensor_needs_an_address(chain: Small, plan: Plan) -> None:
    execution = ready(chain, plan)
    execution.bind("x", room(chain, "x"), (3,))
    with pytest.raises(EngineError, match=r"^small.plan: y has no address$"):
        execution.enqueue()


def test_outputs_need_their_room(chain: Small, run: Execution) -> None:
    run.bind("y", room(chain, "y"), (2,))
    with pytest.raises(EngineError, match=r"y will be \[3\], but there is room for \[2\]"):
        run.enqueue()
    run.bind("x", room(chain, "x"), (2,))
    run.enqueue()
    chain.cuda.synchronize(chain.stream)


def test_inputs_must_agree(attention: Small, attending_run: Execution) -> None:
    attending_run.bind("k", room(attention, "k"), (1, ROWS + 1, 64))
    with pytest.raises(EngineError, match="inputs' shapes contradict each other"):
        attending_run.enqueue()


def test_what_tensorrt_refuses_is_told(run: Execution, chain: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set_input_shape", "set_tensor_address", "execute_async_v3"):
        monkeypatch.setattr(IExecutionContext, name, lambda self, *_: self._refuse("because"))
    with pytest.raises(EngineError, match=r"TensorRT can't run small.plan: .*because"):
        run.enqueue()
    with pytest.raises(EngineError, match=r"refuses x \[2\]: .*because"):
        run.bind("x", room(chain, "x"), (2,))
    with pytest.raises(EngineError, match=r"refuses the address of y: .*because"):
        run.bind("y", room(chain, "y"), (3,))


def test_past_and_present_lie_in_one_place(attention: Small, attending_run: Execution) -> None:
    attending_run.enqueue()
    attention.cuda.synchronize(attention.stream)
    attending_run.bind("present_v", attention.place("elsewhere", 1 << 16), (1, 1, CAPACITY, 64))
    with pytest.raises(EngineError, match="present_v must lie where past_v does"):
        attending_run.enqueue()


def test_tensorrt_and_starkv_agree_on_aliases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From 10.15 on it says which output shares an input's memory."""
    state = install(monkeypatch, "10.16.1.11", FakeCuda())
    trt().get_plugin_registry().load_library(str(plugin_library(tmp_path)))
    small = Small(attending(tmp_path / "a.onnx"), ATTENDING_SHAPES, state.cuda.new_stream(), state.cuda)
    plan = opened(small, tmp_path)
    ready(small, plan, ALIASES)
    with pytest.raises(EngineError, match="TensorRT wants present_v in the memory of past_v"):
        ready(small, plan, {"present_k": "past_k"})
    small.cuda.synchronize(small.stream)


def test_a_plan_without_the_profile(chain: Small, plan: Plan) -> None:
    size = plan.scratch_bytes(0)
    with pytest.raises(EngineError, match=r"small.plan has no profile 1"):
        Execution(plan, 1, chain.place("scratch", size), size, chain.stream)


def test_a_context_that_can_not_be_made(chain: Small, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ICudaEngine, "create_execution_context", lambda *_: None)
    with pytest.raises(EngineError, match=r"can't run profile 0 of small.plan: no reason given"):
        ready(chain, plan)


def test_types_of_tensors(state: State) -> None:
    types = state.enum("DataType")
    assert numpy_dtype(trt(), types.BF16) == ml_dtypes.bfloat16
    assert numpy_dtype(trt(), types.INT64) == np.int64
    assert numpy_dtype(trt(), types.BOOL) == np.bool_
    with pytest.raises(EngineError, match=r"tensor of type .*INT8"):
        numpy_dtype(trt(), types.INT8)


@pytest.mark.parametrize(
    ("version", "reader"),
    [("10.3.0.26", IStreamReader), ("10.7.0.23", IStreamReaderV2), ("11.1.0.106", IStreamReaderV2)],
)
def test_a_plan_is_never_in_memory_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, reader: type
) -> None:
    """Read in pieces; 10.3 asks for all at once, and gets the file's own pages."""
    state = install(monkeypatch, version, FakeCuda())
    small = Small(chained(tmp_path / "c.onnx"), CHAINED_SHAPES, state.cuda.new_stream(), state.cuda)
    monkeypatch.setattr(plan_reader, "_PIECE", 100)
    pieces: list[Any] = []
    offered: list[Any] = []
    deserialize = trt().Runtime.deserialize_cuda_engine

    def note(runtime: Any, source: Any) -> Any:
        offered.append(source)
        read = source.read

        def noted(*arguments: int) -> Any:
            pieces.append(read(*arguments))
            return pieces[-1]

        source.read = noted
        try:
            return deserialize(runtime, source)
        finally:
            source.read = read
            sizes.extend(len(piece) for piece in pieces)
            kinds.update(type(piece) for piece in pieces)
            pieces.clear()

    sizes: list[int] = []
    kinds: set[type] = set()
    monkeypatch.setattr(trt().Runtime, "deserialize_cuda_engine", note)
    plan = opened(small, tmp_path)
    assert plan.tensors.keys() == {"x", "y"}
    assert isinstance(offered[0], reader)
    if reader is IStreamReaderV2:
        assert max(sizes) <= 100
        assert kinds == {bytes}
    else:
        assert kinds == {memoryview}
