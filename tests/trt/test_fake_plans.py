# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake runtime about plans, libraries and weights, broken on purpose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import H100, ORIN, install
from fake_tensorrt.state import MisuseError, State
from onnx import helper
from small_engines import FLOAT, Small, save, scaled, trt, value

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


def test_an_engine_describes_its_tensors(times: Small, state: State, tmp_path: Path) -> None:
    module, engine = trt(), times.engine()
    modes = module.TensorIOMode
    assert [engine.get_tensor_mode(name) for name in "xyz"] == [modes.INPUT, modes.OUTPUT, modes.NONE]
    assert engine.get_tensor_dtype("x") == module.DataType.FLOAT
    assert engine.get_tensor_profile_shape("x", 0) == [(1, 4), (2, 4), (8, 4)]
    node = helper.make_node("Sqrt", ["x"], ["y"], name="s")
    fixed = save(tmp_path / "f.onnx", [node], [value("x", FLOAT, 4)], [value("y", FLOAT, 4)])
    engine = Small(fixed, {}, times.stream, state.cuda, profiles=0).engine()
    assert engine.num_optimization_profiles == 1
    assert engine.get_tensor_profile_shape("x", 0) == [(4,)] * 3


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


def test_readers_can_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = install(monkeypatch, "10.16.1.11", FakeCuda())
    small = Small(scaled(tmp_path / "s.onnx"), {"x": ((1, 4),) * 3}, 1, state.cuda)
    plan = small.build()
    assert plan is not None
    stuck = reader("10.16.1.11", plan, 1 << 30)
    monkeypatch.setattr(type(stuck), "seek", lambda *_: False)
    assert loaded(small, stuck) is None


def test_a_reader_of_another_version_is_no_reader(times: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    old = reader("10.3.0.26", b"", 1)
    install(monkeypatch, "11.1.0.106", FakeCuda())
    with pytest.raises(TypeError):
        loaded(times, old)
