# SPDX-License-Identifier: Apache-2.0
"""Looking into a TensorRT engine while it runs: how long its layers take, and what they put out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from numpy.typing import NDArray

from starkv.runtime.engines.cuda import Cuda
from starkv.trt_compat.execution import Execution
from starkv.trt_compat.inspecting import timed_layers, watched_values


@contextmanager
def layer_times(executions: Mapping[str, Execution]) -> Iterator[dict[str, dict[str, float]]]:
    """Collect the milliseconds of each layer of each execution, over all their runs in the block."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(timed_layers(run)) for name, run in executions.items()}


@contextmanager
def layer_values(executions: Sequence[Execution], cuda: Cuda) -> Iterator[dict[str, NDArray[Any]]]:
    """Collect the values that plans were built to show; they are there after the block."""

    def fetch(address: int, array: NDArray[Any], stream: int) -> None:
        cuda.download(array, address, stream)
        cuda.synchronize(stream)

    values: dict[str, NDArray[Any]] = {}
    with ExitStack() as stack:
        seen = [stack.enter_context(watched_values(run, fetch)) for run in executions]
        yield values
        for part in seen:
            values |= part
