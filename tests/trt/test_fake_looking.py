# SPDX-License-Identifier: Apache-2.0
"""The fake's ways to look at an engine while it runs (debug tensors, layer times, CUDA graphs), and their rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import CudaMisuseError
from fake_tensorrt.state import MisuseError, State
from onnx import helper
from small_engines import FLOAT, Small, save, trt, value


@pytest.fixture
def chain(state: State, tmp_path: Path) -> Small:
    """``y = sqrt(x * 4) + 1``, in steps that are called a and b."""
    nodes = [
        helper.make_node("Mul", ["x", "four"], ["a"], name="times"),
        helper.make_node("Sqrt", ["a"], ["b"], name="root"),
        helper.make_node("Add", ["b", "one"], ["y"], name="plus"),
    ]
    constants = {"four": np.full(1, 4, np.float32), "one": np.ones(1, np.float32)}
    graph = save(tmp_path / "c.onnx", nodes, [value("x", FLOAT, "N")], [value("y", FLOAT, "N")], constants)
    shapes = {"x": ((1,), (3,), (64,))}
    return Small(graph, shapes, state.cuda.new_stream(), state.cuda)


def marked(small: Small, *names: str) -> Any:
    """An engine in which tensors can be looked at."""
    module = trt()
    small.logger = module.Logger()
    builder = module.Builder(small.logger)
    network = builder.create_network(2)
    assert module.OnnxParser(network, small.logger).parse_from_file(str(small.graph))
    for index in range(network.num_layers):
        tensor = network.get_layer(index).get_output(0)
        if tensor.name in names:
            assert network.mark_debug(tensor)
    assert not network.mark_debug(network.get_input(0))
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *small.shapes["x"])
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    config.add_optimization_profile(profile)
    return small.engine(bytes(builder.build_serialized_network(network, config)))


def listener(small: Small, seen: dict[str, np.ndarray], waits: bool = True) -> Any:
    module = trt()

    class Listener(module.IDebugListener):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IDebugListener.__init__(self)

        def process_debug_tensor(
            self, addr: int, location: Any, type: Any, shape: Any, name: str, stream: int
        ) -> None:
            assert type == module.DataType.FLOAT
            assert location == module.TensorLocation.DEVICE
            seen[name] = np.zeros(tuple(shape), np.float32)
            small.cuda.download(seen[name], addr, stream)
            if waits:
                small.cuda.synchronize(stream)

    return Listener()


# --- debug tensors ---


def test_marked_tensors_are_shown_while_a_run_is_enqueued(chain: Small) -> None:
    engine, seen = marked(chain, "a", "b"), dict[str, np.ndarray]()
    assert engine.is_debug_tensor("a")
    context = chain.context(engine)
    assert context.set_debug_listener(listener(chain, seen))
    chain.put("x", np.array([1, 4, 9], np.float32))
    assert context.execute_async_v3(chain.stream)
    assert not seen, "they are off until somebody turns them on"
    assert context.set_all_tensors_debug_state(True)
    assert context.execute_async_v3(chain.stream)
    np.testing.assert_array_equal(seen["a"], [4, 16, 36])
    np.testing.assert_array_equal(seen["b"], [2, 4, 6])
    np.testing.assert_array_equal(chain.get("y", (3,)), [3, 5, 7])
    seen.clear()
    assert context.set_tensor_debug_state("a", False)
    assert context.execute_async_v3(chain.stream)
    assert list(seen) == ["b"]
    chain.cuda.synchronize(chain.stream)


def test_only_marked_tensors_are_shown(chain: Small) -> None:
    context = chain.context(marked(chain, "a"))
    assert not context.set_tensor_debug_state("b", True)
    assert "was not marked" in chain.said


def test_a_shown_tensor_is_copied_within_the_callback(chain: Small) -> None:
    context = chain.context(marked(chain, "a"))
    context.set_debug_listener(listener(chain, {}, waits=False))
    context.set_all_tensors_debug_state(True)
    with pytest.raises(MisuseError, match="a is looked at without waiting"):
        context.execute_async_v3(chain.stream)
    chain.cuda.synchronize(chain.stream)


def test_what_a_listener_raises_is_printed(chain: Small, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(trt().IDebugListener):  # type: ignore[misc]
        def __init__(self) -> None:
            trt().IDebugListener.__init__(self)

        def process_debug_tensor(self, *arguments: Any) -> None:
            chain.cuda.synchronize(chain.stream)
            raise ValueError("broken")

    context = chain.context(marked(chain, "a"))
    context.set_debug_listener(Broken())
    context.set_all_tensors_debug_state(True)
    assert context.execute_async_v3(chain.stream)
    assert "broken" in capsys.readouterr().err
    chain.cuda.synchronize(chain.stream)


# --- layer times ---


def profiler(told: list[str]) -> Any:
    module = trt()

    class Profiler(module.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            assert ms >= 0
            told.append(layer_name)

    return Profiler()


def test_layers_are_timed_at_each_run_or_on_request(chain: Small) -> None:
    told: list[str] = []
    context = chain.context(marked(chain))
    assert not context.report_to_profiler()
    context.profiler = profiler(told)
    context.execute_async_v3(chain.stream)
    assert told == ["times", "root", "plus"], "with a profiler, a run is done when the call returns"
    told.clear()
    context.enqueue_emits_profile = False
    context.execute_async_v3(chain.stream)
    assert told == []
    assert context.report_to_profiler()
    assert told == ["times", "root", "plus"]


def test_layers_have_numbers_where_the_plan_has_no_names(chain: Small) -> None:
    told: list[str] = []
    chain.change = lambda config: setattr(config, "profiling_verbosity", trt().ProfilingVerbosity.NONE)
    context = chain.context()
    context.profiler = profiler(told)
    context.execute_async_v3(chain.stream)
    assert told == ["0", "1", "2"]


def test_a_graph_is_timed_on_request_only(chain: Small) -> None:
    told: list[str] = []
    context = chain.context(marked(chain))
    context.profiler = profiler(told)
    context.execute_async_v3(chain.stream)
    chain.cuda.begin_capture(chain.stream)
    assert not context.execute_async_v3(chain.stream)
    assert "can't be timed" in chain.said
    context.enqueue_emits_profile = False
    assert context.execute_async_v3(chain.stream)
    assert not context.report_to_profiler(), "not while a graph is captured"
    graph = chain.cuda.end_capture(chain.stream)
    told.clear()
    chain.cuda.launch(graph, chain.stream)
    assert context.report_to_profiler()
    assert told == ["times", "root", "plus"]


def test_an_inspector_tells_layers(chain: Small) -> None:
    module, inspector = trt(), marked(chain).create_engine_inspector()
    told = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))
    assert [layer["Name"] for layer in told["Layers"]] == ["times", "root", "plus"]
    assert inspector.get_engine_information(module.LayerInformationFormat.ONELINE).split() == [
        "times",
        "root",
        "plus",
    ]
    plain = chain.engine(chain.build()).create_engine_inspector()
    told = json.loads(plain.get_engine_information(module.LayerInformationFormat.JSON))
    assert told["Layers"] == ["times", "root", "plus"], "names only, without DETAILED"
    with pytest.raises(TypeError, match="format"):
        plain.get_engine_information("json")


# --- CUDA graphs ---


def test_a_graph_is_captured_after_a_first_run(chain: Small) -> None:
    context = chain.context()
    for shape in ((3,), (2,)):
        context.set_input_shape("x", shape)
        chain.cuda.begin_capture(chain.stream)
        with pytest.raises(MisuseError, match="have run once"):
            context.execute_async_v3(chain.stream)
        chain.cuda.end_capture(chain.stream)
        context.execute_async_v3(chain.stream)
    chain.cuda.begin_capture(chain.stream)
    context.set_input_shape("x", (2,))
    assert context.execute_async_v3(chain.stream), "the same shape again is no change"
    chain.cuda.end_capture(chain.stream)
    chain.cuda.synchronize(chain.stream)


def test_streamed_weights_are_not_captured(chain: Small) -> None:
    chain.flags = ("WEIGHT_STREAMING",)
    engine = chain.engine()
    engine.weight_streaming_budget_v2 = 4
    context = chain.context(engine)
    context.execute_async_v3(chain.stream)
    chain.cuda.synchronize(chain.stream)
    chain.cuda.begin_capture(chain.stream)
    with pytest.raises(MisuseError, match="weights are streamed"):
        context.execute_async_v3(chain.stream)


def test_weights_that_all_lie_on_the_card_are_captured(chain: Small) -> None:
    chain.flags = ("WEIGHT_STREAMING",)
    context = chain.context()
    context.execute_async_v3(chain.stream)
    chain.cuda.synchronize(chain.stream)
    chain.cuda.begin_capture(chain.stream)
    assert context.execute_async_v3(chain.stream)


def test_nothing_is_looked_at_within_a_capture(chain: Small) -> None:
    context = chain.context(marked(chain, "a"))
    context.set_debug_listener(listener(chain, {}))
    context.execute_async_v3(chain.stream)
    context.set_all_tensors_debug_state(True)
    chain.cuda.synchronize(chain.stream)
    chain.cuda.begin_capture(chain.stream)
    with pytest.raises(MisuseError, match="while a graph is captured"):
        context.execute_async_v3(chain.stream)


def captured(small: Small, context: Any) -> Any:
    context.execute_async_v3(small.stream)
    small.cuda.synchronize(small.stream)
    small.cuda.begin_capture(small.stream)
    context.execute_async_v3(small.stream)
    return small.cuda.end_capture(small.stream)


def test_a_graph_replays_what_was_enqueued(chain: Small) -> None:
    graph = captured(chain, chain_context := chain.context())
    chain_context.set_input_shape("x", (2,))
    for number in (1.0, 4.0):
        chain.put("x", np.full(3, number, np.float32))
        chain.cuda.launch(graph, chain.stream)
        assert (chain.get("y", (3,)) == 2 * number**0.5 + 1).all()
    chain.cuda.destroy_graph(graph)
    for act in (chain.cuda.launch, lambda graph, _: chain.cuda.destroy_graph(graph)):
        with pytest.raises(CudaMisuseError, match="destroyed"):
            act(graph, chain.stream)


@pytest.mark.parametrize("name", ["y", "scratch"])
def test_a_graph_does_not_outlive_its_memory(chain: Small, name: str) -> None:
    context = chain.context()
    graph = captured(chain, context)
    chain.cuda.free(chain.held[name])
    chain.cuda.launch(graph, chain.stream)
    with pytest.raises(CudaMisuseError, match="was freed"):
        chain.cuda.synchronize(chain.stream)


def test_a_graph_does_not_outlive_its_context(chain: Small) -> None:
    context = chain.context()
    graph = captured(chain, context)
    del context
    chain.cuda.launch(graph, chain.stream)
    with pytest.raises(MisuseError, match="after its context is gone"):
        chain.cuda.synchronize(chain.stream)
