# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake parser and builder, broken on purpose: what lets a wrong program pass proves nothing.

Where a rule is written stands beside it in ``fake_tensorrt``.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import H100, install
from fake_tensorrt.state import MisuseError, State
from onnx import helper
from small_engines import ATTENDING_SHAPES, BF16, FLOAT, Small, attending, save, trt, value

from starkv.gpu import Gpu

# --- parsing ---


def test_a_network_must_be_strongly_typed(state: State) -> None:
    with pytest.raises(MisuseError, match="strongly typed"):
        trt().Builder(trt().Logger()).create_network(0)


def test_strong_typing_is_another_bit_in_11(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, number in (("10.16.1.11", 1), ("11.1.0.106", 0)):
        install(monkeypatch, version, FakeCuda())
        flag = trt().NetworkDefinitionCreationFlag.STRONGLY_TYPED
        assert int(flag) == number
        assert trt().Builder(trt().Logger()).create_network(1 << int(flag)).get_flag(flag)


def test_plugins_come_before_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = install(monkeypatch, cuda=FakeCuda())
    small = Small(attending(tmp_path / "a.onnx"), ATTENDING_SHAPES, state.cuda.new_stream(), state.cuda)
    with pytest.raises(ValueError, match="Plugin not found"):
        small.build()


@pytest.mark.parametrize("wrong", [{"plugin_version": "2"}, {"plugin_namespace": "starkv"}])
def test_a_plugin_is_named_in_full(state: State, tmp_path: Path, wrong: dict[str, str]) -> None:
    small = Small(attending(tmp_path / "a.onnx", **wrong), ATTENDING_SHAPES, 1, state.cuda)
    with pytest.raises(ValueError, match="Plugin not found"):
        small.build()


def test_a_plugin_may_not_have_a_standard_operators_name(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Compress", ["x", "x"], ["y"], name="c", domain="ai.starkv")
    graph = save(tmp_path / "c.onnx", [node], [value("x", FLOAT, 4)], [value("y", FLOAT, 4)])
    with pytest.raises(ValueError, match="No importer"):
        Small(graph, {}, 1, state.cuda).build()


def test_operators_have_a_first_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = helper.make_node("RMSNormalization", ["x", "w"], ["y"], name="n")
    inputs = [value("x", FLOAT, 2, 4), value("w", FLOAT, 4)]
    graph = save(tmp_path / "n.onnx", [node], inputs, [value("y", FLOAT, 2, 4)], opset=21)
    for version, known in (("10.3.0.26", False), ("10.13.3.9", False), ("10.16.1.11", True)):
        state = install(monkeypatch, version, FakeCuda())
        network = trt().Builder(trt().Logger()).create_network(2)
        parser = trt().OnnxParser(network, trt().Logger())
        assert parser.parse_from_file(str(graph)) == known
        assert parser.supports_operator("RMSNormalization") == known
        assert parser.num_errors == (0 if known else 1)
        if not known:
            error = parser.get_error(0)
            assert (error.node_name(), error.node_operator(), error.node()) == ("n", "RMSNormalization", 0)
        assert state.builds == []


def with_function(path: Path) -> Path:
    model = onnx.load(path)
    body = helper.make_node("Identity", ["q"], ["out"])
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("ai.starkv", "KVAttention", ["q"], ["out"], [body], opsets))
    onnx.save(model, path)
    return path


def test_a_function_hides_the_plugin_of_its_name(state: State, tmp_path: Path) -> None:
    path = with_function(attending(tmp_path / "a.onnx"))
    with pytest.raises(ValueError, match="hides the plugin"):
        Small(path, ATTENDING_SHAPES, 1, state.cuda).build()


def test_opsets_end_somewhere(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Sqrt", ["x"], ["y"], name="s")
    graph = save(tmp_path / "s.onnx", [node], [value("x", FLOAT, 4)], [value("y", FLOAT, 4)], opset=23)
    with pytest.raises(ValueError, match="newer than 21"):
        Small(graph, {}, 1, state.cuda).build()


def test_int8_is_no_type_of_an_input(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"], name="i")
    kinds = [value(name, onnx.TensorProto.INT8, 4) for name in "xy"]
    with pytest.raises(ValueError, match="unsupported type int8"):
        Small(save(tmp_path / "i.onnx", [node], kinds[:1], kinds[1:]), {}, 1, state.cuda).build()


def test_what_is_no_file_or_no_graph_is_reported(times: Small, tmp_path: Path) -> None:
    for content, reason in ((None, "Failed to open"), (b"no graph", "Failed to parse")):
        path = tmp_path / "wrong.onnx"
        if content:
            path.write_bytes(content)
        times.graph = path
        with pytest.raises(ValueError, match=reason):
            times.build()
    with pytest.raises(TypeError, match="not str"):
        trt().OnnxParser(trt().Builder(times.logger).create_network(2), times.logger).parse_from_file(path)


def test_weights_lie_beside_the_graph(times: Small) -> None:
    model = onnx.load(times.graph)
    (weight,) = model.graph.initializer
    onnx.external_data_helper.set_external_data(weight, "missing.data", 0, 16)
    weight.ClearField("raw_data")
    onnx.save(model, times.graph)
    with pytest.raises(ValueError, match="Failed to load weights"):
        times.build()


# --- building ---


def test_operands_must_have_one_type(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Mul", ["x", "w"], ["y"], name="times")
    inputs = [value("x", FLOAT, 4), value("w", BF16, 4)]
    graph = save(tmp_path / "m.onnx", [node], inputs, [value("y", FLOAT, 4)])
    small = Small(graph, {"x": ((4,),) * 3, "w": ((4,),) * 3}, 1, state.cuda)
    assert small.build() is None
    assert "times: operands of BFLOAT16 and FLOAT in a strongly typed network" in small.said


def test_a_dynamic_input_needs_a_profile(times: Small) -> None:
    times.shapes = {}
    assert times.build() is None
    assert "has no optimization profile" in times.said


def test_an_empty_profile_is_not_valid(state: State) -> None:
    builder = trt().Builder(trt().Logger())
    config = builder.create_builder_config()
    assert config.add_optimization_profile(builder.create_optimization_profile()) == -1
    assert config.num_optimization_profiles == 0


def test_every_profile_is_about_the_networks_inputs(times: Small) -> None:
    times.shapes = {**times.shapes, "z": ((1,), (1,), (1,))}
    assert times.build() is None
    assert "z, which is no input" in times.said


@pytest.mark.parametrize("shape", [(8, 5), (8,)])
def test_a_profile_must_fit_the_network(times: Small, shape: tuple[int, ...]) -> None:
    least = (1, 4)[: len(shape)]
    times.shapes = {"x": (least, least, shape)}
    assert times.build() is None
    assert "contradicts the network" in times.said


@pytest.mark.parametrize("ranges", [((3, 4), (2, 4), (8, 4)), ((1, 4), (9, 4), (8, 4)), ((-1, 4),) * 3])
def test_a_profile_is_ordered(times: Small, ranges: Any) -> None:
    times.shapes = {"x": ranges}
    with pytest.raises(RuntimeError, match="inconsistent"):
        times.build()


def test_dimensions_of_one_name_are_equal_at_each_corner(attention: Small) -> None:
    attention.shapes = {**ATTENDING_SHAPES, "q": ((1, 1, 128), (1, 5, 128), (1, 8, 128))}
    assert attention.build() is None
    assert "kOPT values for profile 0 violate shape constraints: S is 5 in q, but 4 in k" in attention.said


def test_shapes_must_agree_within_the_graph_at_each_corner(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "w"], ["y"], name="plus")
    inputs = [value("x", FLOAT, "N"), value("w", FLOAT, "M")]
    graph = save(tmp_path / "p.onnx", [node], inputs, [value("y", FLOAT, "N")])
    small = Small(graph, {"x": ((2,), (4,), (8,)), "w": ((2,), (4,), (9,))}, 1, state.cuda)
    assert small.build() is None
    assert "kMAX values for profile 0 violate shape constraints" in small.said


def test_aliases_need_the_preview_feature(attention: Small) -> None:
    attention.preview = False
    with pytest.raises(MisuseError, match="preview feature"):
        attention.build()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(("FP16",), "kFP16 can't be set"), (("REFIT", "REFIT_IDENTICAL"), "only one kind of refitting")],
)
def test_some_flags_exclude_others(times: Small, flags: tuple[str, ...], reason: str) -> None:
    times.flags = flags
    assert times.build() is None
    assert reason in times.said


def test_plans_for_ampere_are_built_on_ampere(monkeypatch: pytest.MonkeyPatch, times: Small) -> None:
    install(monkeypatch, cuda=times.cuda, gpu=Gpu("T4", (7, 5), 16 << 30))

    def wide(config: Any) -> None:
        config.hardware_compatibility_level = trt().HardwareCompatibilityLevel.AMPERE_PLUS

    times.change = wide
    assert times.build() is None
    assert "older device" in times.said


def test_a_misspelled_setting_is_refused(state: State) -> None:
    config = trt().Builder(trt().Logger()).create_builder_config()
    with pytest.raises(AttributeError, match="builder_optimisation_level"):
        config.builder_optimisation_level = 3
    with pytest.raises(TypeError, match="flag"):
        config.set_flag(4)
    config.builder_optimization_level = 9
    assert config.builder_optimization_level == 3


def test_too_little_memory_fails_the_build(times: Small, state: State) -> None:
    state.workspace_needed = 1 << 20
    times.change = lambda config: config.set_memory_pool_limit(trt().MemoryPoolType.WORKSPACE, 1 << 19)
    assert times.build() is None
    assert "insufficient memory" in times.said
    state.workspace_needed = 0
    state.cuda.reserved = state.cuda.total
    assert times.build() is None
    assert "OutOfMemory" in times.said


def test_no_builder_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gpu=None)
    logger = trt().Logger()
    with pytest.raises(TypeError, match="nullptr"):
        trt().Builder(logger)
    assert "error: 35" in logger._lines[0]
    assert H100.capability == (9, 0)


# --- caches and monitors ---


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


def test_callbacks_call_their_base(state: State) -> None:
    class Silent(trt().IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="IProgressMonitor.__init__\\(\\) must be called"):
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
    assert reason in capsys.readouterr().err
