# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake's execution contexts, broken on purpose."""

import gc
from typing import Any

import numpy as np
import pytest
from fake_cuda import CudaMisuseError
from fake_tensorrt.plugin_nodes import reference, run_plugin
from fake_tensorrt.state import Current, MisuseError, State
from small_engines import BFLOAT16, Small, check_packing

# --- what is right ---


def test_a_right_program_computes(times: Small) -> None:
    context = times.context()
    times.put("x", np.arange(8, dtype=np.float32).reshape(2, 4))
    assert context.execute_async_v3(times.stream)
    np.testing.assert_array_equal(times.get("y", (2, 4)), 3 * np.arange(8).reshape(2, 4))


def test_a_right_plugin_writes_in_place(attention: Small) -> None:
    context = attention.context()
    attention.put("v", np.ones((1, 4, 64), BFLOAT16))
    assert context.execute_async_v3(attention.stream)
    cache = attention.get("past_v", (1, 1, 64, 64), BFLOAT16)
    assert (cache[0, 0, :4] == 1).all()
    assert not cache[0, 0, 4:].any()
    assert (attention.get("out", (1, 4, 128), BFLOAT16) == 1).all()


def test_a_packable_plugin_writes_floats_or_codes_in_place(packable: Small) -> None:
    check_packing(packable)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_a_plugin_gives_what_the_network_says(attention: Small, state: State, dtype: Any) -> None:
    rows = 4 if dtype == np.float32 else 3

    def wrong(node: Any, values: Any) -> Any:
        results = run_plugin(reference(), node, values)
        return {**results, "out": results["out"][:, :rows].astype(dtype)}

    state.execute = wrong
    context = attention.context()
    context.execute_async_v3(attention.stream)
    with pytest.raises(MisuseError, match=r"out is .* declared bfloat16 \(1, 4, 128\)"):
        attention.cuda.synchronize(attention.stream)


# --- addresses and shapes ---


@pytest.mark.parametrize("name", ["x", "y"])
def test_every_tensor_needs_an_address(times: Small, name: str) -> None:
    context = times.context()
    assert context.set_tensor_address(name, 0)
    assert not context.execute_async_v3(times.stream)
    assert f"{name} has no address" in times.said


def test_every_input_needs_a_shape(times: Small) -> None:
    engine = times.engine()
    context = times.context(engine)
    assert context.infer_shapes() == []
    assert context.get_tensor_shape("x") == context.get_tensor_shape("y") == (2, 4)
    context.set_optimization_profile_async(0, times.stream)
    assert context.infer_shapes() == ["x"]
    assert not context.all_binding_shapes_specified
    for name in "xy":
        assert context.get_tensor_shape(name) == engine.get_tensor_shape(name) == (-1, 4)
    assert context.update_device_memory_size_for_shapes() == 0
    assert not context.execute_async_v3(times.stream)
    assert "x has no shape" in times.said


def test_shapes_lie_in_the_profile(times: Small) -> None:
    context = times.context()
    for shape in ((0, 4), (9, 4), (2, 5), (2,)):
        assert not context.set_input_shape("x", shape)
    assert "outside of the profile" in times.said
    for name in "yz":
        assert not context.set_input_shape(name, (2, 4))
    with pytest.raises(TypeError, match="shape"):
        context.set_input_shape("x", np.array([2, 4]))


def test_dimensions_of_one_name_are_equal(attention: Small) -> None:
    context = attention.context()
    assert context.set_input_shape("q", (1, 3, 128))
    with pytest.raises(RuntimeError, match="infer_shapes"):
        context.infer_shapes()
    assert not context.execute_async_v3(attention.stream)
    assert "S is 3 in q, but 4 in k" in attention.said


def test_addresses_are_aligned(times: Small) -> None:
    context = times.context()
    with pytest.raises(MisuseError, match="aligned to 256"):
        context.set_tensor_address("x", times.held["x"] + 16)
    assert not context.set_tensor_address("z", times.held["x"])


def test_addresses_are_the_cards(times: Small) -> None:
    context = times.context()
    array = np.zeros(1 << 12, np.uint8)
    context.set_tensor_address("x", -(-array.ctypes.data // 256) * 256)
    with pytest.raises(CudaMisuseError, match=r"x: 32 bytes .* not in one allocation"):
        context.execute_async_v3(times.stream)


def test_memory_is_large_enough(times: Small) -> None:
    context = times.context()
    context.set_tensor_address("y", times.cuda.allocate(16))
    with pytest.raises(CudaMisuseError, match="y: 32 bytes"):
        context.execute_async_v3(times.stream)


@pytest.mark.parametrize("name", ["x", "scratch"])
def test_memory_is_not_used_after_it_is_freed(times: Small, name: str) -> None:
    context = times.context()
    times.cuda.synchronize(times.stream)
    times.cuda.free(times.held[name])
    with pytest.raises(CudaMisuseError, match="was freed"):
        context.execute_async_v3(times.stream)


def test_past_and_present_share_memory(attention: Small) -> None:
    context = attention.context()
    context.set_tensor_address("present_v", attention.place("elsewhere", 1 << 16))
    with pytest.raises(MisuseError, match="present_v does not share the memory of past_v"):
        context.execute_async_v3(attention.stream)


@pytest.mark.parametrize(
    ("name", "place", "offset"), [("y", "x", 0), ("x", "y", 256), ("y", "scratch", 0), ("x", "scratch", 256)]
)
def test_outputs_and_scratch_overlap_nothing(times: Small, name: str, place: str, offset: int) -> None:
    context = times.context()
    context.set_input_shape("x", (8, 4))
    times.shapes = {"x": ((1, 4), (8, 4), (8, 4))}
    context.set_tensor_address(name, times.held[place] + (offset if place == "scratch" else 0))
    with pytest.raises(MisuseError, match="overlap"):
        context.execute_async_v3(times.stream)


def test_inputs_may_share_memory(attention: Small) -> None:
    context = attention.context()
    assert context.set_tensor_address("v", attention.held["k"])
    assert context.execute_async_v3(attention.stream)
    attention.cuda.synchronize(attention.stream)


def test_an_output_does_not_overlap_a_cache(attention: Small) -> None:
    context = attention.context()
    context.set_tensor_address("out", attention.held["past_k"] + 256)
    with pytest.raises(MisuseError, match="overlap"):
        context.execute_async_v3(attention.stream)


# --- profiles and streams ---


def test_a_profile_is_chosen_where_there_are_several(times: Small) -> None:
    times.profiles = 2
    engine = times.engine()
    context = times.context(engine)
    with pytest.raises(RuntimeError, match="set optimization profile async"):
        context.set_optimization_profile_async(2, times.stream)
    with pytest.raises(MisuseError, match="default stream"):
        context.set_optimization_profile_async(1, 0)
    fresh = engine.create_execution_context()
    fresh.set_input_shape("x", (2, 4))
    for name in "xy":
        fresh.set_tensor_address(name, times.held[name])
    with pytest.raises(MisuseError, match="no profile is set"):
        fresh.execute_async_v3(times.stream)


def test_shapes_are_set_again_after_a_change_of_profile(times: Small) -> None:
    times.profiles = 2
    context = times.context()
    context.set_optimization_profile_async(1, times.stream)
    assert not context.execute_async_v3(times.stream)
    assert "x has no shape" in times.said


def test_a_profile_arrives_before_a_run(times: Small) -> None:
    times.profiles = 2
    context = times.context()
    other = times.cuda.new_stream()
    context.set_optimization_profile_async(1, other)
    context.set_input_shape("x", (2, 4))
    with pytest.raises(MisuseError, match="set on another stream"):
        context.execute_async_v3(times.stream)
    times.cuda.synchronize(other)
    assert context.execute_async_v3(times.stream)
    times.cuda.synchronize(times.stream)


def test_nothing_runs_on_the_default_stream(times: Small) -> None:
    with pytest.raises(CudaMisuseError, match="default stream"):
        times.context().execute_async_v3(0)


def test_a_context_outlives_its_work(times: Small) -> None:
    context = times.context()
    context.execute_async_v3(times.stream)
    del context
    gc.collect()
    assert Current.violations == ["a context goes while its work is queued"]
    Current.violations.clear()
    with pytest.raises(MisuseError, match="after its context is gone"):
        times.cuda.synchronize(times.stream)


def test_an_engine_lives_as_long_as_its_contexts(times: Small) -> None:
    context = times.context()
    gc.collect()
    times.put("x", np.ones((2, 4), np.float32))
    context.execute_async_v3(times.stream)
    assert (times.get("y", (2, 4)) == 3).all()


def test_results_come_when_somebody_waits(times: Small) -> None:
    context = times.context()
    times.put("x", np.ones((2, 4), np.float32))
    context.execute_async_v3(times.stream)
    early = np.zeros((2, 4), np.float32)
    times.cuda.download(early, times.held["y"], times.stream)
    assert (early.view(np.uint8) == 0x7F).all(), "poison until the stream is waited for"
    times.cuda.synchronize(times.stream)
    assert (early == 3).all()
