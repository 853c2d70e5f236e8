# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake builder, broken on purpose: what lets a wrong program pass proves nothing.

Where a rule is written stands beside it in ``fake_tensorrt``.
"""

from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import H100, install
from fake_tensorrt.state import MisuseError, State
from onnx import helper
from small_engines import ATTENDING_SHAPES, BF16, FLOAT, Small, save, trt, value

from starkv.gpu import Gpu


def test_operands_must_have_one_type(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Mul", ["x", "w"], ["y"], name="times")
    inputs = [value("x", FLOAT, 4), value("w", BF16, 4)]
    graph = save(tmp_path / "m.onnx", [node], inputs, [value("y", FLOAT, 4)])
    small = Small(graph, {"x": ((4,),) * 3, "w": ((4,),) * 3}, 1, state.cuda)
    assert small.build() is None
    assert "times: operands of BFLOAT16 and FLOAT in a strongly typed network" in small.said


def test_a_dynamic_input_needs_a_profile(times: Small) -> None:
    times.shapes = {}
    assert times.build() is None
    assert "has no optimization profile" in times.said


def test_an_empty_profile_is_not_valid(state: State) -> None:
    builder = trt().Builder(trt().Logger())
    config = builder.create_builder_config()
    assert config.add_optimization_profile(builder.create_optimization_profile()) == -1
    assert config.num_optimization_profiles == 0


def test_every_profile_is_about_the_networks_inputs(times: Small) -> None:
    times.shapes = {**times.shapes, "z": ((1,), (1,), (1,))}
    assert times.build() is None
    assert "z, which is no input" in times.said


@pytest.mark.parametrize("shape", [(8, 5), (8,)])
def test_a_profile_must_fit_the_network(times: Small, shape: tuple[int, ...]) -> None:
    least = (1, 4)[: len(shape)]
    times.shapes = {"x": (least, least, shape)}
    assert times.build() is None
    assert "contradicts the network" in times.said


@pytest.mark.parametrize("ranges", [((3, 4), (2, 4), (8, 4)), ((1, 4), (9, 4), (8, 4)), ((-1, 4),) * 3])
def test_a_profile_is_ordered(times: Small, ranges: Any) -> None:
    times.shapes = {"x": ranges}
    with pytest.raises(RuntimeError, match="inconsistent"):
        times.build()


def test_dimensions_of_one_name_are_equal_at_each_corner(attention: Small) -> None:
    attention.shapes = {**ATTENDING_SHAPES, "q": ((1, 1, 128), (1, 5, 128), (1, 8, 128))}
    assert attention.build() is None
    assert "kOPT values for profile 0 violate shape constraints: S is 5 in q, but 4 in k" in attention.said


def test_shapes_must_agree_within_the_graph_at_each_corner(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "w"], ["y"], name="plus")
    inputs = [value("x", FLOAT, "N"), value("w", FLOAT, "M")]
    graph = save(tmp_path / "p.onnx", [node], inputs, [value("y", FLOAT, "N")])
    small = Small(graph, {"x": ((2,), (4,), (8,)), "w": ((2,), (4,), (9,))}, 1, state.cuda)
    assert small.build() is None
    assert "kMAX values for profile 0 violate shape constraints" in small.said


def test_aliases_need_the_preview_feature(attention: Small) -> None:
    attention.preview = False
    with pytest.raises(MisuseError, match="preview feature"):
        attention.build()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(("FP16",), "kFP16 can't be set"), (("REFIT", "REFIT_IDENTICAL"), "only one kind of refitting")],
)
def test_some_flags_exclude_others(times: Small, flags: tuple[str, ...], reason: str) -> None:
    times.flags = flags
    assert times.build() is None
    assert reason in times.said


def test_plans_for_ampere_are_built_on_ampere(monkeypatch: pytest.MonkeyPatch, times: Small) -> None:
    install(monkeypatch, cuda=times.cuda, gpu=Gpu("T4", (7, 5), 16 << 30))

    def wide(config: Any) -> None:
        config.hardware_compatibility_level = trt().HardwareCompatibilityLevel.AMPERE_PLUS

    times.change = wide
    assert times.build() is None
    assert "older device" in times.said


def test_a_misspelled_setting_is_refused(state: State) -> None:
    config = trt().Builder(trt().Logger()).create_builder_config()
    with pytest.raises(AttributeError, match="builder_optimisation_level"):
        config.builder_optimisation_level = 3
    with pytest.raises(TypeError, match="flag"):
        config.set_flag(4)
    config.builder_optimization_level = 9
    assert config.builder_optimization_level == 3


def test_too_little_memory_fails_the_build(times: Small, state: State) -> None:
    state.workspace_needed = 1 << 20
    times.change = lambda config: config.set_memory_pool_limit(trt().MemoryPoolType.WORKSPACE, 1 << 19)
    assert times.build() is None
    assert "insufficient memory" in times.said
    state.workspace_needed = 0
    state.cuda.reserved = state.cuda.total
    assert times.build() is None
    assert "OutOfMemory" in times.said


def test_no_builder_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gpu=None)
    logger = trt().Logger()
    with pytest.raises(TypeError, match="nullptr"):
        trt().Builder(logger)
    assert "error: 35" in logger._lines[0]
    assert H100.capability == (9, 0)


def test_an_output_has_the_type_it_is_declared_with(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Sqrt", ["x"], ["y"], name="s")
    graph = save(tmp_path / "s.onnx", [node], [value("x", FLOAT, 4)], [value("y", BF16, 4)])
    small = Small(graph, {}, 1, state.cuda, profiles=0)
    assert small.build() is None
    assert "output y is declared with another type" in small.said


def test_an_output_has_the_shape_it_is_declared_with(state: State, tmp_path: Path) -> None:
    node = helper.make_node("Sqrt", ["x"], ["y"], name="s")
    graph = save(tmp_path / "s.onnx", [node], [value("x", FLOAT, 4)], [value("y", FLOAT, 5)])
    small = Small(graph, {}, 1, state.cuda, profiles=0)
    assert small.build() is None
    assert "y is declared [5], computed (4,)" in small.said


def test_nothing_can_not_be_built(state: State) -> None:
    logger = trt().Logger()
    builder = trt().Builder(logger)
    config = builder.create_builder_config()
    assert builder.build_serialized_network(builder.create_network(2), config) is None
    assert "no layers" in logger._lines[-1]
