# SPDX-License-Identifier: Apache-2.0
"""The fake's ways to look at an engine while it runs, and their rules."""

import json
from typing import Any

import numpy as np
import pytest
from fake_tensorrt.state import MisuseError
from small_engines import Small, trt


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
    chain.marked = ("a", "b")
    engine, seen = chain.engine(), dict[str, np.ndarray]()
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
    chain.marked = ("a",)
    context = chain.context()
    assert not context.set_tensor_debug_state("b", True)
    assert "was not marked" in chain.said


def test_tensors_of_the_network_are_marked(chain: Small) -> None:
    module = trt()
    network = module.Builder(module.Logger()).create_network(2)
    assert module.OnnxParser(network, module.Logger()).parse_from_file(str(chain.graph))
    assert not network.mark_debug(network.get_input(0))
    tensor = network.get_layer(0).get_output(0)
    assert network.mark_debug(tensor)
    assert network.is_debug_tensor(tensor)
    assert network.unmark_debug(tensor)
    assert not network.is_debug_tensor(tensor)


def test_a_shown_tensor_is_copied_within_the_callback(chain: Small) -> None:
    chain.marked = ("a",)
    context = chain.context()
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

    chain.marked = ("a",)
    context = chain.context()
    context.set_debug_listener(Broken())
    context.set_all_tensors_debug_state(True)
    assert context.execute_async_v3(chain.stream)
    assert "broken" in capsys.readouterr().err
    chain.cuda.synchronize(chain.stream)


def test_nothing_is_looked_at_within_a_capture(chain: Small) -> None:
    chain.marked = ("a",)
    context = chain.context()
    context.set_debug_listener(listener(chain, {}))
    context.execute_async_v3(chain.stream)
    context.set_all_tensors_debug_state(True)
    chain.cuda.synchronize(chain.stream)
    chain.cuda.begin_capture(chain.stream)
    with pytest.raises(MisuseError, match="while a graph is captured"):
        context.execute_async_v3(chain.stream)


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
    context = chain.context()
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
    context = chain.context()
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


def detailed(config: Any) -> None:
    config.profiling_verbosity = trt().ProfilingVerbosity.DETAILED


def test_an_inspector_tells_layers(chain: Small) -> None:
    chain.change = detailed
    module, inspector = trt(), chain.engine().create_engine_inspector()
    told = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))
    assert [layer["Name"] for layer in told["Layers"]] == ["times", "root", "plus"]
    assert inspector.get_engine_information(module.LayerInformationFormat.ONELINE).split() == [
        "times",
        "root",
        "plus",
    ]
    chain.change = lambda config: None
    plain = chain.engine().create_engine_inspector()
    told = json.loads(plain.get_engine_information(module.LayerInformationFormat.JSON))
    assert told["Layers"] == ["times", "root", "plus"], "names only, without DETAILED"
    with pytest.raises(TypeError, match="format"):
        plain.get_engine_information("json")
