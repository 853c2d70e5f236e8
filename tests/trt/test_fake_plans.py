# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake runtime about plans, libraries and weights, broken on purpose."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import H100, ORIN, install
from fake_tensorrt.state import MisuseError, State
from small_engines import Small, scaled, trt

from starkv.gpu import Gpu


def loaded(small: Small, source: Any) -> Any:
    small.logger = trt().Logger()
    return trt().Runtime(small.logger).deserialize_cuda_engine(source)


# --- libraries and cards ---


def test_a_library_is_loaded_once(state: State, tmp_path: Path) -> None:
    registry = trt().get_plugin_registry()
    assert registry.load_library(str(tmp_path / "libstarkv_trt.so")) is None, "a second load"
    state.plugins.clear()
    assert registry.load_library(str(tmp_path / "missing.so")) is None
    (tmp_path / "text.so").write_text("no library")
    assert registry.load_library(str(tmp_path / "text.so")) is None
    with pytest.raises(TypeError, match="plugin_path"):
        registry.load_library(tmp_path / "libstarkv_trt.so")
    assert registry.load_library(str(tmp_path / "libstarkv_trt.so")) is not None
    assert registry.get_creator("KVAttention", "1", "ai.starkv") is not None
    assert registry.get_creator("KVAttention", "1", "") is None


def test_no_runtime_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10.16.1.11", gpu=None)
    with pytest.raises(MisuseError, match="without a CUDA device"):
        trt().Runtime(trt().Logger())
    with pytest.raises(RuntimeError, match="cuda driver"):
        trt().IStreamReaderV2()


# --- plans ---


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan[:-1],
        lambda plan: plan[:20],
        lambda plan: plan[:-1] + bytes([plan[-1] ^ 1]),
        lambda plan: b"",
        lambda plan: b"x" + plan[1:],
    ],
)
def test_damaged_plans_are_refused(times: Small, change: Callable[[bytes], bytes]) -> None:
    plan = times.build()
    assert plan is not None
    assert loaded(times, change(plan)) is None
    assert "truncated" in times.said


def test_plans_of_others_are_refused(times: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = times.build()
    for version, gpu, reason in (("10.16.1.11", H100, "of version"), ("10.3.0.26", ORIN, "incompatible")):
        install(monkeypatch, version, FakeCuda(), gpu)
        assert loaded(times, plan) is None
        assert reason in times.said


@pytest.mark.parametrize(
    ("level", "card", "runs"),
    [
        ("NONE", H100, True),
        ("NONE", Gpu("GH200", (9, 0), 1 << 30), False),
        ("SAME_COMPUTE_CAPABILITY", Gpu("GH200", (9, 0), 1 << 30), True),
        ("SAME_COMPUTE_CAPABILITY", ORIN, False),
        ("AMPERE_PLUS", ORIN, True),
        ("AMPERE_PLUS", Gpu("T4", (7, 5), 1 << 30), False),
    ],
)
def test_a_plan_runs_on_the_cards_it_was_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, card: Gpu, runs: bool
) -> None:
    state = install(monkeypatch, "10.13.3.9", FakeCuda())
    small = Small(scaled(tmp_path / "s.onnx"), {"x": ((1, 4),) * 3}, 1, state.cuda)

    def compatible(config: Any) -> None:
        config.hardware_compatibility_level = getattr(trt().HardwareCompatibilityLevel, level)

    small.change = compatible
    plan = small.build()
    install(monkeypatch, "10.13.3.9", FakeCuda(), card)
    assert (loaded(small, plan) is not None) == runs


def test_a_version_compatible_plan_holds_code(times: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    times.flags = ("VERSION_COMPATIBLE",)
    plan = times.build()
    install(monkeypatch, "10.16.1.11", FakeCuda())
    assert loaded(times, plan) is None
    assert "not allowed" in times.said
    runtime = trt().Runtime(times.logger)
    runtime.engine_host_code_allowed = True
    assert runtime.deserialize_cuda_engine(plan) is not None
    install(monkeypatch, "11.1.0.106", FakeCuda())
    runtime = trt().Runtime(times.logger)
    runtime.engine_host_code_allowed = True
    assert runtime.deserialize_cuda_engine(plan) is None


def test_a_plan_needs_its_plugins(attention: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = attention.build()
    install(monkeypatch, cuda=FakeCuda())
    assert loaded(attention, plan) is None
    assert "could not find plugin" in attention.said


# --- readers ---


def reader(version: str, content: bytes, most: int) -> Any:
    """Gives at most so many bytes at a time; raises where ``most`` is negative."""
    module, place = trt(), [0]

    def take(size: int) -> bytes:
        if most < 0:
            raise OSError("the disk is gone")
        piece = content[place[0] : place[0] + min(size, most)]
        place[0] += len(piece)
        return piece

    if version == "10.3.0.26":

        class Reader(module.IStreamReader):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                module.IStreamReader.__init__(self)

            def read(self, size: int) -> bytes:
                return take(size)

        return Reader()

    class ReaderV2(module.IStreamReaderV2):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            return take(num_bytes)

        def seek(self, offset: int, where: Any) -> bool:
            place[0] = offset
            return bool(where == module.SeekPosition.SET)

    return ReaderV2()


@pytest.mark.parametrize(
    ("version", "most", "opens"),
    [
        ("10.3.0.26", 1 << 30, True),
        ("10.3.0.26", 64, False),
        ("10.3.0.26", -1, False),
        ("10.16.1.11", 1 << 30, True),
        ("10.16.1.11", 64, True),
        ("10.16.1.11", 0, False),
        ("10.16.1.11", -1, False),
    ],
)
def test_readers_give_all_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, most: int, opens: bool
) -> None:
    """``IStreamReader`` at once, ``IStreamReaderV2`` bit by bit."""
    state = install(monkeypatch, version, FakeCuda())
    small = Small(scaled(tmp_path / "s.onnx"), {"x": ((1, 4),) * 3}, 1, state.cuda)
    plan = small.build()
    assert plan is not None
    assert (loaded(small, reader(version, plan, most)) is not None) == opens


def test_a_reader_of_another_version_is_no_reader(times: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    old = reader("10.3.0.26", b"", 1)
    install(monkeypatch, "11.1.0.106", FakeCuda())
    with pytest.raises(TypeError):
        loaded(times, old)


# --- weights ---


def test_weights_take_the_cards_memory(times: Small, state: State) -> None:
    plan = times.build()
    engine = loaded(times, plan)
    assert state.cuda.memory()[0] == state.cuda.total - 16
    del engine
    gc.collect()
    assert state.cuda.memory()[0] == state.cuda.total
    state.cuda.reserved = state.cuda.total
    assert loaded(times, plan) is None
    assert "OutOfMemory" in times.said


def test_a_context_of_its_own_takes_memory(times: Small, state: State) -> None:
    engine = times.engine()
    before = state.cuda.memory()[0]
    context = engine.create_execution_context()
    assert state.cuda.memory()[0] == before - engine.device_memory_size_v2
    del context
    state.cuda.reserved = state.cuda.total
    assert engine.create_execution_context() is None


def stripped(small: Small) -> Any:
    small.flags = ("STRIP_PLAN", "REFIT_IDENTICAL")
    return small.engine()


def test_a_stripped_plan_must_be_refitted(times: Small) -> None:
    plan = times.build()
    engine = stripped(times)
    assert b"scale" in (plan or b"")
    context = times.context(engine)
    with pytest.raises(MisuseError, match="stripped"):
        context.execute_async_v3(times.stream)
    times.cuda.synchronize(times.stream)
    refitter = trt().Refitter(engine, times.logger)
    assert refitter.get_all_weights() == refitter.get_missing_weights() == ["scale"]
    assert not refitter.refit_cuda_engine()
    parser = trt().OnnxParserRefitter(refitter, times.logger)
    assert not parser.refit_from_file("missing.onnx")
    assert parser.refit_from_file(str(times.graph))
    assert refitter.refit_cuda_engine()
    times.put("x", np.ones((2, 4), np.float32))
    context.execute_async_v3(times.stream)
    assert (times.get("y", (2, 4)) == 3).all()


def other_weights(path: Path, change: Callable[[np.ndarray], np.ndarray], name: str = "scale") -> Path:
    model = onnx.load(path)
    (weight,) = model.graph.initializer
    changed = change(onnx.numpy_helper.to_array(weight))
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, name))
    other = path.with_name("other.onnx")
    onnx.save(model, other)
    return other


@pytest.mark.parametrize("change", [lambda a: a[:2], lambda a: a.astype(np.float16)])
def test_weights_must_fit(times: Small, change: Callable[[np.ndarray], np.ndarray]) -> None:
    refitter = trt().Refitter(stripped(times), times.logger)
    parser = trt().OnnxParserRefitter(refitter, times.logger)
    assert not parser.refit_from_file(str(other_weights(times.graph, change)))
    assert "setNamedWeights" in times.said


def test_weights_must_be_named_as_they_were(times: Small) -> None:
    refitter = trt().Refitter(stripped(times), times.logger)
    parser = trt().OnnxParserRefitter(refitter, times.logger)
    assert not parser.refit_from_file(str(other_weights(times.graph, lambda a: a, "other")))
    assert "has no weights scale" in times.said


def test_identical_weights_are_identical(times: Small) -> None:
    refitter = trt().Refitter(stripped(times), times.logger)
    parser = trt().OnnxParserRefitter(refitter, times.logger)
    assert parser.refit_from_file(str(other_weights(times.graph, lambda a: a + 1)))
    with pytest.raises(MisuseError, match="not what the engine was built with"):
        refitter.refit_cuda_engine()


def test_weights_change_between_runs_only(times: Small) -> None:
    times.flags = ("REFIT",)
    engine = times.engine()
    context = times.context(engine)
    times.put("x", np.ones((2, 4), np.float32))
    context.execute_async_v3(times.stream)
    refitter = trt().Refitter(engine, times.logger)
    parser = trt().OnnxParserRefitter(refitter, times.logger)
    assert parser.refit_from_file(str(other_weights(times.graph, lambda a: a + 1)))
    with pytest.raises(MisuseError, match="while its work is queued"):
        refitter.refit_cuda_engine()
    assert (times.get("y", (2, 4)) == 3).all()
    assert refitter.refit_cuda_engine()
    context.execute_async_v3(times.stream)
    assert (times.get("y", (2, 4)) == 4).all()


def test_only_refittable_engines_are_refitted(times: Small) -> None:
    with pytest.raises(TypeError, match="nullptr"):
        trt().Refitter(times.engine(), times.logger)
    assert "isRefittable" in times.said


def test_the_weights_budget_comes_before_contexts(times: Small, state: State) -> None:
    times.flags = ("WEIGHT_STREAMING",)
    engine = times.engine()
    assert engine.streamable_weights_size == 16
    assert state.cuda.reserved == 0
    whole = engine.device_memory_size_v2
    engine.weight_streaming_budget_v2 = 8
    assert engine.weight_streaming_budget_v2 == 8
    assert engine.device_memory_size_v2 > whole, "streamed weights need room"
    context = times.context(engine)
    assert state.cuda.reserved == 8
    engine.weight_streaming_budget_v2 = 16
    assert engine.weight_streaming_budget_v2 == 8
    assert "while there are contexts" in times.said
    del context


def test_weights_are_streamed_where_the_plan_says_so(times: Small) -> None:
    engine = times.engine()
    engine.weight_streaming_budget_v2 = 8
    assert engine.weight_streaming_budget_v2 == engine.streamable_weights_size == 0
    assert "streams no weights" in times.said
