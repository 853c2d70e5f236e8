# SPDX-License-Identifier: Apache-2.0
"""Looking into a plan: its layers, how long they take, and what they put out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_engines import Small
from small_plans import opened, ready, room

from starkv.errors import EngineError
from starkv.trt_compat.execution import Execution
from starkv.trt_compat.inspecting import plan_layers, timed_layers, watched_values


@pytest.fixture
def run(chain: Small, tmp_path: Path) -> Execution:
    return ready(chain, opened(chain, tmp_path))


def test_layers_have_names_and_times(chain: Small, run: Execution) -> None:
    assert plan_layers(run.plan) == ["times", "root", "plus"]
    with timed_layers(run) as times:
        for _ in range(2):
            run.bind("x", room(chain, "x"), (3,))
            run.bind("y", room(chain, "y"), (3,))
            run.enqueue()
    assert times.keys() == {"times", "root", "plus"}
    assert all(ms >= 0 for ms in times.values())
    before = dict(times)
    run.bind("x", room(chain, "x"), (3,))
    run.bind("y", room(chain, "y"), (3,))
    run.enqueue()
    chain.cuda.synchronize(chain.stream)
    assert times == before


@pytest.fixture
def watched(chain: Small, tmp_path: Path) -> Execution:
    chain.marked = ("a", "b")
    return ready(chain, opened(chain, tmp_path))


def observe(small: Small, run: Execution, fetch: Callable[..., None]) -> dict[str, Any]:
    with watched_values(run, fetch) as values:
        run.bind("x", room(small, "x"), (2,))
        run.bind("y", room(small, "y"), (2,))
        small.put("x", np.array([4, 9], np.float32))
        run.enqueue()
        small.cuda.synchronize(small.stream)
    return values


def test_values_inside_of_a_plan(chain: Small, watched: Execution) -> None:
    def fetch(address: int, array: np.ndarray, stream: int) -> None:
        chain.cuda.download(array, address, stream)
        chain.cuda.synchronize(stream)

    values = observe(chain, watched, fetch)
    assert {name: list(array) for name, array in values.items()} == {"a": [16, 36], "b": [4, 6]}


def test_values_that_can_not_be_fetched(chain: Small, watched: Execution) -> None:
    """TensorRT swallows what a listener raises."""

    def fetch(address: int, array: np.ndarray, stream: int) -> None:
        chain.cuda.synchronize(stream)
        raise EngineError("cudaMemcpyAsync: launch failure")

    with pytest.raises(EngineError, match="launch failure"):
        observe(chain, watched, fetch)
    chain.cuda.synchronize(chain.stream)
