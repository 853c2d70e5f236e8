# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake about memory for activations, broken on purpose."""

from typing import Any

import numpy as np
import pytest
from fake_cuda import CudaMisuseError
from fake_tensorrt.state import MisuseError
from small_engines import Small, trt


def user_managed(engine: Any) -> Any:
    return engine.create_execution_context(trt().ExecutionContextAllocationStrategy.USER_MANAGED)


def test_scratch_is_given_aligned_and_enough(times: Small) -> None:
    engine = times.engine()
    size = engine.get_device_memory_size_for_profile_v2(0)
    context = user_managed(engine)
    with pytest.raises(MisuseError, match="are needed"):
        context.set_device_memory(times.place("scratch", size), size - 1)
    with pytest.raises(MisuseError, match="256 bytes"):
        context.set_device_memory(times.place("scratch", size) + 8, size)
    with pytest.raises(CudaMisuseError, match="not in one allocation"):
        context.set_device_memory(times.place("scratch", size), size + 256)
    with pytest.raises(MisuseError, match="has its own"):
        engine.create_execution_context().set_device_memory(times.place("scratch", size), size)


def test_scratch_must_be_given(times: Small) -> None:
    context = user_managed(times.engine())
    context.set_input_shape("x", (2, 4))
    for name in "xy":
        context.set_tensor_address(name, times.place(name, 128))
    with pytest.raises(MisuseError, match="without memory"):
        context.execute_async_v3(times.stream)


def test_scratch_for_shapes_serves_these_shapes_only(attention: Small) -> None:
    times = attention
    engine = times.engine()
    context = user_managed(engine)
    context.set_optimization_profile_async(0, times.stream)
    for name, shapes in times.shapes.items():
        context.set_input_shape(name, shapes[0])
    size = context.update_device_memory_size_for_shapes()
    assert 0 < size <= engine.get_device_memory_size_for_profile_v2(0)
    context.set_device_memory(times.place("small", size), size)


def test_scratch_is_not_shared_between_streams(times: Small) -> None:
    engine = times.engine()
    other = Small(times.graph, times.shapes, times.cuda.new_stream(), times.cuda)
    one = times.context(engine)
    other.held["scratch"] = times.held["scratch"]
    two = other.context(engine)
    for stream in (times.stream, other.stream):
        times.cuda.synchronize(stream)
    assert one.execute_async_v3(times.stream)
    with pytest.raises(CudaMisuseError, match="on two streams"):
        two.execute_async_v3(other.stream)
    times.cuda.synchronize(times.stream)
    assert two.execute_async_v3(other.stream)
    times.cuda.synchronize(other.stream)


def test_scratch_keeps_nothing(times: Small) -> None:
    context = times.context()
    context.execute_async_v3(times.stream)
    size = times.cuda.blocks[times.held["scratch"]].size
    assert (times.get("scratch", (size,), np.uint8) == 0xEE).all()
