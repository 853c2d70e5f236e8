# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake about weights, broken on purpose: their memory, refitting, streaming."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt.state import MisuseError, State
from small_engines import Small, trt


def test_weights_take_the_cards_memory(times: Small, state: State) -> None:
    plan = times.build()
    engine = times.engine(plan)
    assert state.cuda.memory()[0] == state.cuda.total - 16
    del engine
    gc.collect()
    assert state.cuda.memory()[0] == state.cuda.total
    state.cuda.reserved = state.cuda.total
    assert times.engine(plan) is None
    assert "OutOfMemory" in times.said


def test_a_context_of_its_own_takes_memory(times: Small, state: State) -> None:
    engine = times.engine()
    before = state.cuda.memory()[0]
    context = engine.create_execution_context()
    assert state.cuda.memory()[0] == before - engine.device_memory_size_v2
    del context
    state.cuda.reserved = state.cuda.total
    assert engine.create_execution_context() is None


def test_streamed_weights_take_their_budget_with_the_first_context(times: Small, state: State) -> None:
    times.flags = ("WEIGHT_STREAMING",)
    engine = times.engine()
    state.cuda.reserved = state.cuda.total
    assert engine.create_execution_context(trt().ExecutionContextAllocationStrategy.USER_MANAGED) is None
    assert "OutOfMemory" in times.said


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
