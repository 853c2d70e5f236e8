# SPDX-License-Identifier: Apache-2.0
"""The fake's timing caches, and how it calls what callers subclass."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import H100, install
from fake_tensorrt.state import MisuseError, State
from onnx import helper
from small_engines import FLOAT, Small, save, trt, value

from starkv.gpu import Gpu


def test_a_cache_holds_what_was_measured(times: Small, state: State) -> None:
    kept: list[Any] = []

    def attach(content: bytes) -> Any:
        def change(config: Any) -> None:
            cache = config.create_timing_cache(content)
            assert config.set_timing_cache(cache, False)
            kept[:] = [cache]

        return change

    times.change = attach(b"")
    times.build()
    assert state.measured == 1
    times.change = attach(bytes(kept[0].serialize()))
    times.build()
    assert state.measured == 1


def test_caches_of_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def cache_of(version: str, gpu: Gpu, content: bytes = b"") -> tuple[Any, Any]:
        install(monkeypatch, version, FakeCuda(), gpu)
        config = trt().Builder(trt().Logger()).create_builder_config()
        return config, config.create_timing_cache(content)

    _, other_card = cache_of("10.3.0.26", Gpu("Orin", (8, 7), 1))
    _, other_version = cache_of("10.13.3.9", H100)
    config, own = cache_of("10.3.0.26", H100)
    assert not config.set_timing_cache(other_card, False)
    assert config.set_timing_cache(other_card, True)
    assert not config.set_timing_cache(other_version, True)
    assert not own.combine(other_card, False)
    assert own.combine(other_card, True)
    assert not own.combine(other_version, True)
    assert config.create_timing_cache(b"damaged") is None


def monitor(going: Any, told: list[Any]) -> Any:
    class Monitor(trt().IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt().IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            told.append(("start", phase_name, parent_phase, num_steps, threading.current_thread().name))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return bool(going())

        def phase_finish(self, phase_name: str) -> None:
            told.append(("finish", phase_name))

    return Monitor()


def test_a_monitor_hears_phases_from_several_threads(times: Small) -> None:
    told: list[Any] = []
    times.change = lambda config: setattr(config, "progress_monitor", monitor(lambda: True, told))
    assert times.build() is not None
    assert [entry[:3] for entry in told] == [
        ("start", "Building engine", None),
        ("start", "Selecting tactics", "Building engine"),
        ("finish", "Selecting tactics"),
        ("finish", "Building engine"),
    ]
    assert told[0][4] != told[1][4]


def failing() -> bool:
    return bool(1 / 0)


@pytest.mark.parametrize("going", [lambda: False, failing])
def test_a_monitor_can_cancel(times: Small, going: Any, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Any] = []
    times.change = lambda config: setattr(config, "progress_monitor", monitor(going, told))
    assert times.build() is None
    assert "cancelled" in times.said
    assert told[-1] == ("finish", "Building engine")
    assert ("division by zero" in capsys.readouterr().err) == (going is failing)


def test_what_the_fakes_complain_of_is_not_swallowed(times: Small) -> None:
    def going() -> bool:
        raise MisuseError("wrong")

    times.change = lambda config: setattr(config, "progress_monitor", monitor(going, []))
    with pytest.raises(MisuseError, match="wrong"):
        times.build()


def test_callbacks_call_their_base(state: State) -> None:
    class Silent(trt().IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"IProgressMonitor.__init__\(\) must be called"):
        Silent()
    with pytest.raises(TypeError, match="logger"):
        trt().Builder(None)
    with pytest.raises(TypeError, match="No constructor"):
        trt().IBuilderConfig()


@pytest.mark.parametrize(
    ("write", "reason"),
    [(lambda data: len(data) - 1, ""), (lambda data: None, "in integer"), (lambda data: 1 / 0, "Exception")],
)
def test_a_writer_takes_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Any,
    reason: str,
) -> None:
    install(monkeypatch, "10.13.3.9", FakeCuda())

    class Writer(trt().IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt().IStreamWriter.__init__(self)

        def write(self, data: bytes) -> Any:
            return write(data)

    logger = trt().Logger()
    builder = trt().Builder(logger)
    network = builder.create_network(2)
    node = helper.make_node("Mul", ["x", "w"], ["y"], name="times")
    weight = {"w": np.ones(4, np.float32)}
    graph = save(tmp_path / "m.onnx", [node], [value("x", FLOAT, 4)], [value("y", FLOAT, 4)], weight)
    assert trt().OnnxParser(network, logger).parse_from_file(str(graph))
    assert not builder.build_serialized_network_to_stream(network, builder.create_builder_config(), Writer())
    assert "did not take all" in logger._lines[-1]
    empty = builder.create_network(2)
    assert not builder.build_serialized_network_to_stream(empty, builder.create_builder_config(), Writer())
    assert "no layers" in logger._lines[-1]
    assert reason in capsys.readouterr().err
