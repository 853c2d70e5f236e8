# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake TensorRT, broken on purpose: what lets a wrong program pass proves nothing.

Where a rule is written stands beside it in ``fake_tensorrt``.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import CudaMisuseError, FakeCuda
from fake_tensorrt import H100, ORIN, install
from fake_tensorrt.state import MisuseError, State
from onnx import helper
from small_engines import (
    ATTENDING_SHAPES,
    BF16,
    BFLOAT16,
    FLOAT,
    SCALED_SHAPES,
    Small,
    attending,
    save,
    scaled,
    trt,
    value,
)
from trt_engines import plugin_library


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> State:
    """TensorRT 10.3 with the plugins loaded."""
    installed = install(monkeypatch, cuda=FakeCuda())
    assert trt().get_plugin_registry().load_library(str(plugin_library(tmp_path))) is not None
    return installed


@pytest.fixture
def times(state: State, tmp_path: Path) -> Small:
    return Small(scaled(tmp_path / "scaled.onnx"), SCALED_SHAPES, state.cuda.new_stream(), state.cuda)


@pytest.fixture
def attention(state: State, tmp_path: Path) -> Small:
    return Small(attending(tmp_path / "a.onnx"), ATTENDING_SHAPES, state.cuda.new_stream(), state.cuda)


def said(small: Small) -> str:
    return " ".join(small.logger.lines)


# --- what is right ---


def test_a_right_program_computes(times: Small) -> None:
    context = times.context()
    times.put("x", np.arange(8, dtype=np.float32).reshape(2, 4))
    assert context.execute_async_v3(times.stream)
    np.testing.assert_array_equal(times.get("y", (2, 4)), 3 * np.arange(8).reshape(2, 4))


def test_a_right_plugin_writes_in_place(attention: Small) -> None:
    context = attention.context()
    ones = np.ones((1, 4, 64), BFLOAT16)
    attention.put("v", ones)
    assert context.execute_async_v3(attention.stream)
    cache = attention.get("past_v", (1, 1, 64, 64), BFLOAT16)
    assert (cache[0, 0, :4] == 1).all()
    assert not cache[0, 0, 4:].any()
    assert (attention.get("out", (1, 4, 128), BFLOAT16) == 1).all()


# --- parsing and building ---


def test_a_network_must_be_strongly_typed(state: State) -> None:
    with pytest.raises(MisuseError, match="strongly typed"):
        trt().Builder(trt().Logger()).create_network(0)


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
    for version, known in (("10.3.0.26", False), ("10.16.1.11", True)):
        state = install(monkeypatch, version, FakeCuda())
        small = Small(graph, {}, 1, state.cuda)
        if known:
            assert small.build() is not None
        else:
            with pytest.raises(ValueError, match="No importer"):
                small.build()


def test_a_function_hides_the_plugin_of_its_name(state: State, tmp_path: Path) -> None:
    path = attending(tmp_path / "a.onnx")
    model = onnx.load(path)
    body = helper.make_node("Identity", ["q"], ["out"])
    model.functions.append(
        helper.make_function(
            "ai.starkv", "KVAttention", ["q"], ["out"], [body], [helper.make_opsetid("", 21)]
        )
    )
    onnx.save(model, path)
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


def test_operands_must_have_one_type(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Mul", ["x", "w"], ["y"], name="times")
    inputs = [value("x", FLOAT, 4), value("w", BF16, 4)]
    graph = save(tmp_path / "m.onnx", [node], inputs, [value("y", FLOAT, 4)])
    small = Small(graph, {"x": ((4,),) * 3, "w": ((4,),) * 3}, state.cuda.new_stream(), state.cuda)
    small.context().execute_async_v3(small.stream)
    with pytest.raises(MisuseError, match="strongly typed"):
        state.cuda.synchronize(small.stream)


def test_a_dynamic_input_needs_a_profile(times: Small) -> None:
    times.shapes = {}
    assert times.build() is None
    assert "has no optimization profile" in said(times)


def test_a_profile_must_fit_the_network(times: Small) -> None:
    times.shapes = {"x": ((1, 4), (2, 4), (8, 5))}
    assert times.build() is None
    assert "contradicts the network" in said(times)


def test_a_profile_is_ordered(times: Small) -> None:
    times.shapes = {"x": ((3, 4), (2, 4), (8, 4))}
    with pytest.raises(ValueError, match="inconsistent"):
        times.build()


def test_aliases_need_the_preview_feature(attention: Small) -> None:
    attention.preview = False
    with pytest.raises(MisuseError, match="preview feature"):
        attention.build()


def test_too_little_workspace_fails_the_build(times: Small, state: State) -> None:
    state.workspace_needed = state.cuda.total + 1
    assert times.build() is None
    assert "insufficient memory" in said(times)


def test_a_timing_cache_of_another_card_is_refused(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    config = trt().Builder(trt().Logger()).create_builder_config()
    other = config.create_timing_cache(b'{"device": "another"}')
    assert not config.set_timing_cache(other, False)
    assert config.set_timing_cache(other, True)


def test_a_monitor_can_cancel(times: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    module = trt()

    class Monitor(module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def phase_start(self, *_: Any) -> None:
            pass

        def step_complete(self, *_: Any) -> bool:
            return False

    make = module.Builder.create_builder_config

    def configured(builder: Any) -> Any:
        config = make(builder)
        config.progress_monitor = Monitor()
        return config

    monkeypatch.setattr(module.Builder, "create_builder_config", configured)
    assert times.build() is None
    assert "cancelled" in said(times)


# --- libraries and plans ---


def test_a_library_is_loaded_once(state: State, tmp_path: Path) -> None:
    registry = trt().get_plugin_registry()
    assert registry.load_library(str(tmp_path / "libstarkv_trt.so")) is None
    assert registry.load_library(str(tmp_path / "missing.so")) is None
    (tmp_path / "text.so").write_text("no library")
    assert registry.load_library(str(tmp_path / "text.so")) is None
    assert registry.get_creator("KVAttention", "1", "ai.starkv") is not None
    assert registry.get_creator("KVAttention", "1", "") is None


def test_no_runtime_and_no_builder_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gpu=None)
    for make in (trt().Runtime, trt().Builder):
        with pytest.raises(MisuseError, match="without a CUDA device"):
            make(trt().Logger())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plan: plan[:-1], "truncated"),
        (lambda plan: plan[:20], "truncated"),
        (lambda plan: plan[:-1] + bytes([plan[-1] ^ 1]), "truncated"),
        (lambda plan: b"", "truncated"),
    ],
)
def test_damaged_plans_are_refused(times: Small, change: Callable[[bytes], bytes], reason: str) -> None:
    plan = times.build()
    assert plan is not None
    times.logger = trt().Logger()
    assert trt().Runtime(times.logger).deserialize_cuda_engine(change(plan)) is None
    assert reason in said(times)


def test_plans_of_others_are_refused(times: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = times.build()
    for version, gpu, reason in (("10.16.1.11", H100, "of version"), ("10.3.0.26", ORIN, "incompatible")):
        install(monkeypatch, version, FakeCuda(), gpu)
        assert times.engine(plan) is None
        assert reason in said(times)


def test_a_plan_needs_its_plugins(attention: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = attention.build()
    install(monkeypatch, cuda=FakeCuda())
    assert attention.engine(plan) is None
    assert "could not find plugin" in said(attention)


def test_a_stripped_plan_must_be_refitted(times: Small) -> None:
    times.flags = ("STRIP_PLAN", "REFIT_IDENTICAL")
    engine = times.engine()
    # The constant is small enough to stay in the plan; a large one would be missing.
    engine.program.constants.clear()
    with pytest.raises(MisuseError, match="stripped"):
        times.context(engine)
    module = trt()
    refitter = module.Refitter(engine, times.logger)
    assert refitter.get_missing_weights() == ["scale"]
    assert not refitter.refit_cuda_engine()
    parser = module.OnnxParserRefitter(refitter, times.logger)
    assert not parser.refit_from_file("missing.onnx")
    assert parser.refit_from_file(str(times.graph))
    assert refitter.refit_cuda_engine()
    context = times.context(engine)
    times.put("x", np.ones((2, 4), np.float32))
    context.execute_async_v3(times.stream)
    assert (times.get("y", (2, 4)) == 3).all()


def test_only_refittable_engines_are_refitted(times: Small) -> None:
    with pytest.raises(MisuseError, match="not built for refitting"):
        trt().Refitter(times.engine(), times.logger)


def test_the_weights_budget_comes_before_contexts(times: Small) -> None:
    times.flags = ("WEIGHT_STREAMING",)
    engine = times.engine()
    engine.weight_streaming_budget_v2 = 8
    assert engine.weight_streaming_budget_v2 == 8
    times.context(engine)
    with pytest.raises(MisuseError, match="while contexts exist"):
        engine.weight_streaming_budget_v2 = 16


# --- contexts ---


def test_every_tensor_needs_an_address(times: Small) -> None:
    for name in "xy":
        context = times.context()
        context._addresses[name] = 0
        with pytest.raises(MisuseError, match=f"{name} has no address"):
            context.execute_async_v3(times.stream)


def test_every_input_needs_a_shape(times: Small) -> None:
    context = times.context()
    context._shapes.clear()
    with pytest.raises(MisuseError, match="x has no shape"):
        context.execute_async_v3(times.stream)


def test_shapes_lie_in_the_profile(times: Small) -> None:
    context = times.context()
    for shape in ((0, 4), (9, 4), (2, 5), (2,)):
        assert not context.set_input_shape("x", shape)
    assert "outside of the profile" in said(times)


def test_addresses_are_aligned(times: Small) -> None:
    context = times.context()
    with pytest.raises(MisuseError, match="aligned to 256"):
        context.set_tensor_address("x", times.held["x"] + 16)
    assert not context.set_tensor_address("z", times.held["x"])


def test_addresses_are_the_cards(times: Small) -> None:
    context = times.context()
    array = np.zeros(1 << 12, np.uint8)
    context.set_tensor_address("x", -(-array.ctypes.data // 256) * 256)
    context.execute_async_v3(times.stream)
    with pytest.raises(CudaMisuseError, match="not in one allocation"):
        times.cuda.synchronize(times.stream)


def test_memory_is_large_enough(times: Small) -> None:
    context = times.context()
    times.cuda.synchronize(times.stream)
    context.set_tensor_address("x", times.cuda.allocate(16))
    context.execute_async_v3(times.stream)
    with pytest.raises(CudaMisuseError, match="not in one allocation"):
        times.cuda.synchronize(times.stream)


def test_memory_is_not_used_after_it_is_freed(times: Small) -> None:
    context = times.context()
    times.cuda.synchronize(times.stream)
    times.cuda.free(times.held["x"])
    context.execute_async_v3(times.stream)
    with pytest.raises(CudaMisuseError, match="was freed"):
        times.cuda.synchronize(times.stream)


def test_past_and_present_share_memory(attention: Small) -> None:
    context = attention.context()
    context.set_tensor_address("present_v", attention.place("elsewhere", 1 << 16))
    with pytest.raises(MisuseError, match="present_v does not share the memory of past_v"):
        context.execute_async_v3(attention.stream)


def test_scratch_is_given_aligned_and_enough(times: Small) -> None:
    module, engine = trt(), times.engine()
    strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
    size = engine.get_device_memory_size_for_profile_v2(0)
    context = engine.create_execution_context(strategy)
    with pytest.raises(MisuseError, match="are needed"):
        context.set_device_memory(times.place("scratch", size), size - 1)
    with pytest.raises(MisuseError, match="256 bytes"):
        context.set_device_memory(times.place("scratch", size) + 8, size)
    own = engine.create_execution_context()
    with pytest.raises(MisuseError, match="has its own"):
        own.set_device_memory(times.place("scratch", size), size)
    ready = times.context(engine)
    ready._scratch = None
    with pytest.raises(MisuseError, match="without memory"):
        ready.execute_async_v3(times.stream)


def test_a_profile_is_chosen_where_there_are_several(times: Small) -> None:
    times.profiles = 2
    engine = times.engine()
    context = engine.create_execution_context()
    with pytest.raises(MisuseError, match="no profile is set"):
        context.execute_async_v3(times.stream)
    assert not context.set_optimization_profile_async(2, times.stream)
    with pytest.raises(MisuseError, match="default stream"):
        context.set_optimization_profile_async(1, 0)


def test_shapes_are_set_again_after_a_change_of_profile(times: Small) -> None:
    times.profiles = 2
    context = times.context()
    context.set_optimization_profile_async(1, times.stream)
    with pytest.raises(MisuseError, match="x has no shape"):
        context.execute_async_v3(times.stream)


def test_nothing_runs_on_the_default_stream(times: Small) -> None:
    with pytest.raises(CudaMisuseError, match="default stream"):
        times.context().execute_async_v3(0)


def test_a_graph_is_captured_after_a_first_run(times: Small) -> None:
    context = times.context()
    times.cuda.begin_capture(times.stream)
    with pytest.raises(MisuseError, match="have run once"):
        context.execute_async_v3(times.stream)


def test_streamed_weights_are_not_captured(times: Small) -> None:
    times.flags = ("WEIGHT_STREAMING",)
    context = times.context()
    context.execute_async_v3(times.stream)
    times.cuda.begin_capture(times.stream)
    with pytest.raises(MisuseError, match="weights are streamed"):
        context.execute_async_v3(times.stream)


def test_results_come_when_somebody_waits(times: Small) -> None:
    context = times.context()
    times.put("x", np.ones((2, 4), np.float32))
    context.execute_async_v3(times.stream)
    early = np.zeros((2, 4), np.float32)
    times.cuda.download(early, times.held["y"], times.stream)
    assert (early.view(np.uint8) == 0x7F).all(), "poison until the stream is waited for"
    times.cuda.synchronize(times.stream)
    assert (early == 3).all()


def test_a_graph_replays_what_was_enqueued(times: Small) -> None:
    context = times.context()
    context.execute_async_v3(times.stream)
    times.cuda.synchronize(times.stream)
    times.cuda.begin_capture(times.stream)
    context.execute_async_v3(times.stream)
    graph = times.cuda.end_capture(times.stream)
    for factor in (1.0, 5.0):
        times.put("x", np.full((2, 4), factor, np.float32))
        times.cuda.launch(graph, times.stream)
        assert (times.get("y", (2, 4)) == 3 * factor).all()
    times.cuda.destroy_graph(graph)
    with pytest.raises(CudaMisuseError, match="after it was destroyed"):
        times.cuda.launch(graph, times.stream)


# --- versions ---


def test_names_are_those_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def has(version: str, *names: str) -> list[bool]:
        install(monkeypatch, version, FakeCuda())
        found = []
        for name in names:
            owner: Any = trt()
            *path, last = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            found.append(hasattr(owner, last))
        return found

    names = (
        "IStreamReader",
        "IStreamReaderV2",
        "IStreamWriter",
        "ICudaEngine.get_aliased_input_tensor",
        "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        "BuilderFlag.FP16",
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    )
    assert has("10.3.0.26", *names) == [True, False, False, False, False, True, True]
    assert has("10.13.3.9", *names) == [True, True, True, False, True, True, True]
    assert has("11.1.0.106", *names) == [False, True, True, True, True, False, False]


# --- CUDA alone ---


def test_the_fake_card_is_strict() -> None:
    cuda = FakeCuda(total=1 << 20)
    stream = cuda.new_stream()
    with pytest.raises(Exception, match="out of memory"):
        cuda.allocate(1 << 21)
    block = cuda.allocate(1024)
    cuda.clear(block, 1024, stream)
    with pytest.raises(CudaMisuseError, match="while work is queued"):
        cuda.free(block)
    cuda.synchronize(stream)
    with pytest.raises(CudaMisuseError, match="not in one allocation"):
        cuda.upload(block + 1000, np.zeros(25, np.uint8), stream)
    cuda.free(block)
    with pytest.raises(CudaMisuseError, match="freed twice"):
        cuda.free(block)
    cuda.begin_capture(stream)
    for act in (lambda: cuda.allocate(1), lambda: cuda.synchronize(stream)):
        with pytest.raises(CudaMisuseError, match="while a graph is captured"):
            act()


def test_pinned_memory_is_read_late_and_ordinary_memory_at_once() -> None:
    cuda = FakeCuda()
    stream, block = cuda.new_stream(), cuda.allocate(16)
    late, early = cuda.allocate_pinned((4,), np.int32), np.zeros(4, np.int32)
    for array, expected in ((late, 7), (early, 0)):
        cuda.upload(block, array, stream)
        array[:] = 7
        result = np.zeros(4, np.int32)
        cuda.download(result, block, stream)
        cuda.synchronize(stream)
        assert (result == expected).all()
    cuda.begin_capture(stream)
    with pytest.raises(CudaMisuseError, match="ordinary memory"):
        cuda.upload(block, early, stream)


def test_states_differ_between_tests(state: State) -> None:
    assert replace(state, version="11.1.0.106").since(11, 1)
    assert not state.since(10, 4)
