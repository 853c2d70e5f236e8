# SPDX-License-Identifier: Apache-2.0
"""Looking into a TensorRT engine while it runs: how long its layers take, and what they put out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from numpy.typing import NDArray

from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.trt_compat.execution import Execution
from starkv.trt_compat.inspecting import timed_layers, watched_values


@contextmanager
def layer_times(
    executions: Mapping[str, Execution], memory: CudaMemory
) -> Iterator[dict[str, dict[str, float]]]:
    """Collect the milliseconds of each layer of each execution, over all their runs in the block.

    Args:
        executions: by name.
        memory: of the card, on whose stream they run.
    """
    with ExitStack() as stack:
        times = {name: stack.enter_context(timed_layers(run)) for name, run in executions.items()}
        stack.callback(memory.device.synchronize)
        yield times


@contextmanager
def layer_values(executions: Sequence[Execution], memory: CudaMemory) -> Iterator[dict[str, NDArray[Any]]]:
    """Collect the values that plans were built to show; they are there after the block.

    Args:
        executions: that show them.
        memory: of the card, on whose stream they run.
    """

    def fetch(address: int, array: NDArray[Any], stream: int) -> None:
        memory.cuda.download(array, address, stream)
        memory.cuda.synchronize(stream)

    values: dict[str, NDArray[Any]] = {}
    with ExitStack() as stack:
        seen = [stack.enter_context(watched_values(run, fetch)) for run in executions]
        stack.callback(memory.device.synchronize)
        yield values
        for part in seen:
            values |= part
