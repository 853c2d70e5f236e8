# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake about CUDA graphs of engines, broken on purpose."""

from typing import Any

import numpy as np
import pytest
from fake_cuda import CudaMisuseError
from fake_tensorrt.state import MisuseError
from small_engines import Small


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


def captured(small: Small, context: Any) -> Any:
    context.execute_async_v3(small.stream)
    small.cuda.synchronize(small.stream)
    small.cuda.begin_capture(small.stream)
    context.execute_async_v3(small.stream)
    return small.cuda.end_capture(small.stream)


def test_a_graph_replays_what_was_enqueued(chain: Small) -> None:
    context = chain.context()
    graph = captured(chain, context)
    for number in (1.0, 4.0):
        chain.put("x", np.full(3, number, np.float32))
        chain.cuda.launch(graph, chain.stream)
        assert (chain.get("y", (3,)) == 2 * number**0.5 + 1).all()
    chain.cuda.destroy_graph(graph)
    for act in (chain.cuda.launch, lambda graph, _: chain.cuda.destroy_graph(graph)):
        with pytest.raises(CudaMisuseError, match="destroyed"):
            act(graph, chain.stream)


@pytest.mark.parametrize(
    "change",
    [
        lambda context, _: context.set_input_shape("x", (2,)),
        lambda context, small: context.set_tensor_address("x", small.held["x"] + 256),
        lambda context, small: context.set_device_memory(small.held["scratch"], 1 << 13),
        lambda context, small: context.set_optimization_profile_async(0, small.stream),
    ],
)
def test_a_graph_has_a_context_of_its_own(chain: Small, change: Any) -> None:
    chain.scratch = 1 << 14
    context = chain.context()
    graph = captured(chain, context)
    context.set_input_shape("x", (3,))
    context.set_tensor_address("x", chain.held["x"])
    chain.cuda.launch(graph, chain.stream)
    chain.cuda.synchronize(chain.stream)
    change(context, chain)
    chain.cuda.launch(graph, chain.stream)
    with pytest.raises(MisuseError, match="after its context was bound to something else"):
        chain.cuda.synchronize(chain.stream)


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
