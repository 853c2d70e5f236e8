# SPDX-License-Identifier: Apache-2.0
"""What a plan says of itself: its layers, how long they take, and values inside of it."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError
from starkv.trt_compat.execution import Execution
from starkv.trt_compat.running import Plan, numpy_dtype

Fetch = Callable[[int, NDArray[Any], int], None]
"""Fills an array from an address of the card, on a stream, and waits."""


def plan_layers(plan: Plan) -> list[str]:
    """Names of a plan's layers, as TensorRT fused them."""
    module = plan.runtime.tensorrt.module
    inspector = plan.engine.create_engine_inspector()
    text = inspector.get_engine_information(module.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    return [layer if isinstance(layer, str) else str(layer.get("Name", "")) for layer in layers]


@contextmanager
def timed_layers(execution: Execution) -> Iterator[dict[str, float]]:
    """Collect the milliseconds of each layer over all runs of the block, which must be done when it ends.

    Runs are slower meanwhile, and wait for the card.
    """
    module = execution.plan.runtime.tensorrt.module
    times: dict[str, float] = defaultdict(float)

    class Profiler(module.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: SupportsFloat) -> None:
            times[layer_name] += float(ms)

    execution.renew()
    execution.context.profiler = Profiler()
    try:
        yield times
    finally:
        # Nothing says that a profiler can be taken away.
        execution.renew()


@contextmanager
def watched_values(execution: Execution, fetch: Fetch) -> Iterator[dict[str, NDArray[Any]]]:
    """Collect the values that a plan was built to show (``--debug-layers``), of the runs of the block, which
    must be done when it ends.

    Args:
        execution: what runs.
        fetch: copies from the card.

    Raises:
        EngineError: a value can't be fetched.
    """
    module = execution.plan.runtime.tensorrt.module
    values: dict[str, NDArray[Any]] = {}
    failures: list[EngineError] = []

    class Listener(module.IDebugListener):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IDebugListener.__init__(self)

        def process_debug_tensor(
            self, addr: Any, location: Any, type: Any, shape: Any, name: str, stream: int
        ) -> None:
            try:
                # The content is there only as long as this call lasts.
                array = np.empty(tuple(shape), numpy_dtype(module, type))
                fetch(addr, array, stream)
                values[name] = array
            except EngineError as error:
                # TensorRT would print it and go on.
                failures.append(error)

    execution.renew()
    listener = Listener()
    execution.context.set_debug_listener(listener)
    execution.context.set_all_tensors_debug_state(True)
    try:
        yield values
    finally:
        execution.renew()
    if failures:
        raise failures[0]
