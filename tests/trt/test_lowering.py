# SPDX-License-Identifier: Apache-2.0
"""Graphs in the TensorRT dialect compute what the canonical ones do; float16 stands in for 16 bits."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import PLAIN_PRESETS, TinyModel
from decoder_runner import DecoderRunner, open_session
from lowered_graphs import EXACT, TARGETS, runnable
from tiny_families import make_tiny_opencua, make_tiny_qwen2_vl
from tiny_model import HIDDEN, tiny_card

from starkv.errors import UsageError
from starkv.export.export_model import export_model
from starkv.export.lower import trt_primitives
from starkv.export.lower.trt import LoweredGraph, lower_to_trt
from starkv.export.quantize.presets import PRESETS
from starkv.export.record import read_record
from starkv.manifest import ComputeDtype
from starkv.runtime.preprocess.vision_plan import plan_vision
from starkv.trt_compat.version import OLDEST

TOLERANCE = 5e-3
"""Of the largest value; float16 rounds to 5e-4 at every step."""

GRIDS = {
    "whole windows": (16, 24),
    "cut off in both directions": (20, 36),
    "one row of merged patches": (2, 50),
    "smaller than a window": (4, 6),
    "tall": (58, 10),
}
"""Patches in rows and columns."""

FAMILIES: dict[str, Callable[[Path], object]] = {"qwen2_vl": make_tiny_qwen2_vl, "opencua": make_tiny_opencua}


def lowered(export: Path, out: Path) -> dict[str, LoweredGraph]:
    out.mkdir()
    return {graph.name: graph for graph in lower_to_trt(export, out, OLDEST, "float16")}


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(np.float32) - expected).max() <= TOLERANCE * np.abs(expected).max()


def assert_decodes_alike(export: Path, narrow_graph: Path, head_dim: int) -> None:
    """Prefill, and steps on the cache that it left."""
    text = read_record(export).text
    narrow = DecoderRunner(runnable(narrow_graph), text, config=EXACT)
    wide = DecoderRunner(export / "decoder.onnx", text, config=EXACT)
    random = np.random.default_rng(0)
    for rows in (20, 1, 1, 1):
        embeds = random.standard_normal((1, rows, HIDDEN))
        angles = random.uniform(0, 6, (1, rows, head_dim // 2))
        ours, theirs = (runner.step(embeds, np.cos(angles), np.sin(angles)) for runner in (narrow, wide))
        assert ours.logits.dtype == ours.hidden_norm.dtype == np.float32
        assert ours.q_window.dtype == np.float16
        assert_close(ours.logits, theirs.logits)
        assert_close(ours.q_window, theirs.q_window)
        assert_close(ours.hidden_norm, theirs.hidden_norm)
    for name, cache in narrow.cache.items():
        assert cache.dtype == np.float16
        assert_close(cache[:, :, :23], wide.cache[name][:, :, :23])


def assert_sees_alike(export: Path, narrow_graph: Path, grid: tuple[int, int]) -> None:
    plan = plan_vision(*grid, read_record(export).vision)
    pixels = np.random.default_rng(0).standard_normal((grid[0] * grid[1], 1176)).astype(np.float32)
    feeds = {"pixel_values": pixels, **plan.inputs()}
    graphs = runnable(narrow_graph), export / "vision.onnx"
    ours, theirs = (open_session(graph, EXACT).run(["image_embeds"], feeds)[0] for graph in graphs)
    assert ours.dtype == np.float32
    assert_close(ours, theirs)


@pytest.mark.parametrize("preset", PLAIN_PRESETS)
def test_a_decoder_computes_what_the_canonical_one_does(tiny: TinyModel, tmp_path: Path, preset: str) -> None:
    export = tiny.exports[preset]
    assert_decodes_alike(export, lowered(export, tmp_path / "trt")["decoder"].path, head_dim=64)


@pytest.mark.parametrize("preset", ["fp32", "int4-small"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_vision_tower_sees_what_the_canonical_one_does(
    tiny: TinyModel, tmp_path: Path, preset: str, grid: tuple[int, int]
) -> None:
    export = tiny.exports[preset]
    assert_sees_alike(export, lowered(export, tmp_path / "trt")["vision"].path, grid)


@pytest.mark.parametrize("grid", [(20, 36), (4, 6)])
def test_heads_that_no_plugin_takes_attend_in_primitives(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int]
) -> None:
    monkeypatch.setattr(trt_primitives, "FULL_ATTENTION_HEAD_DIMS", (64, 128))
    vision = lowered(tiny.exports["fp32"], tmp_path / "trt")["vision"].path
    assert "FullAttention" not in [node.op_type for node in ir.load(vision).graph]
    assert_sees_alike(tiny.exports["fp32"], vision, grid)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tmp_path: Path, family: str) -> None:
    """Qwen2-VL's layer norms and its activation; OpenCUA's positions."""
    FAMILIES[family](tmp_path / "checkpoint")
    card, export = tiny_card(family=family), tmp_path / "export"
    export_model(tmp_path / "checkpoint", card, export, PRESETS["int4"])
    graphs = lowered(export, tmp_path / "trt")
    assert_decodes_alike(export, graphs["decoder"].path, head_dim=64)
    assert_sees_alike(export, graphs["vision"].path, (20, 36))


def test_blocks_that_tensorrt_does_not_take_become_16_bits(tiny: TinyModel, tmp_path: Path) -> None:
    export = tmp_path / "export"
    export_model(tiny.checkpoint, tiny_card(), export, replace(PRESETS["int4"], block_size=32))
    graph = lowered(export, tmp_path / "trt")["decoder"]
    assert graph.expanded == 9
    assert "DequantizeLinear" not in [node.op_type for node in ir.load(graph.path).graph]
    assert_decodes_alike(export, graph.path, head_dim=64)


def test_int4_stays_int4_and_int8_becomes_16_bits(tiny: TinyModel, tmp_path: Path) -> None:
    graphs = lowered(tiny.exports["int4-small"], tmp_path / "trt")
    decoder, vision = graphs["decoder"], graphs["vision"]
    assert (decoder.expanded, vision.expanded) == (0, 14)
    codes = {
        str(value.name): value.const_value
        for value in ir.load(decoder.path).graph.initializers.values()
        if value.dtype == ir.DataType.INT4
    }
    canonical = ir.load(tiny.exports["int4-small"] / "decoder.onnx").graph.initializers
    assert len(codes) == 9
    for name, tensor in codes.items():
        original = canonical[name].const_value
        assert tensor is not None
        assert original is not None
        np.testing.assert_array_equal(tensor.numpy(), original.numpy())


def first_scales(graph: ir.Graph) -> tuple[ir.Value, np.ndarray]:
    """The scales of the first quantized layer."""
    scales = next(node for node in graph if node.op_type == "DequantizeLinear").inputs[1]
    assert scales is not None
    assert scales.const_value is not None
    return scales, scales.const_value.numpy()


def scaled_copy(export: Path, out: Path, factor: float) -> Path:
    """A copy of the export with the first quantized layer's scales multiplied."""
    shutil.copytree(export, out)
    model = ir.load(export / "decoder.onnx")
    scales, array = first_scales(model.graph)
    array = array * np.float32(factor)
    (out / "scales.bin").write_bytes(array.tobytes())
    scales.const_value = ir.ExternalTensor(
        "scales.bin", 0, array.nbytes, ir.DataType.FLOAT, shape=scales.shape, name=scales.name, base_dir=out
    )
    ir.save(model, out / "decoder.onnx")
    return out


def test_scales_that_float16_cannot_hold_do_not_become_zero(tiny: TinyModel, tmp_path: Path) -> None:
    export = scaled_copy(tiny.exports["int4"], tmp_path / "export", 1e-12)
    graph = ir.load(lowered(export, tmp_path / "trt")["decoder"].path).graph
    assert set(first_scales(graph)[1].flatten()) == {np.finfo(np.float16).smallest_subnormal}


def test_zero_points_are_refused_with_the_way_out(tiny: TinyModel, tmp_path: Path) -> None:
    export = scaled_copy(tiny.exports["int4"], tmp_path / "export", 1.0)
    model = ir.load(export / "decoder.onnx")
    node = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    zero_point = ir.Value(name="zero", const_value=ir.tensor(np.ones((2, 2), np.int8), name="zero"))
    model.graph.register_initializer(zero_point)
    node.resize_inputs(3)
    node.replace_input_with(2, zero_point)
    ir.save(model, export / "decoder.onnx")
    with pytest.raises(UsageError, match=r"qkv_proj.*zero points.*--quant int4.*--quant fp32") as error:
        lowered(export, tmp_path / "trt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_form_serves_every_version(tiny: TinyModel, tmp_path: Path, dtype: ComputeDtype) -> None:
    """And the rules of each let it pass."""
    hashes = set()
    for name, target in TARGETS.items():
        out = tmp_path / f"{name}-{dtype}"
        out.mkdir()
        hashes.add(tuple(graph.sha256 for graph in lower_to_trt(tiny.exports["int4"], out, target, dtype)))
    assert len(hashes) == 1


def test_a_lowered_graph_says_what_it_weighs(tiny: TinyModel, tmp_path: Path) -> None:
    for name, graph in lowered(tiny.exports["int4"], tmp_path / "trt").items():
        assert (graph.name, graph.path.name) == (name, f"{name}.onnx")
        if name == "compress":
            assert (graph.data, graph.weight_bytes) == (None, 0)
        else:
            assert graph.data is not None
            # Padding between tensors is all that a data file has more; small constants lie in the graph.
            assert 0.5 * graph.data.stat().st_size < graph.weight_bytes < graph.data.stat().st_size + 4096
    onnx.checker.check_model(tmp_path / "trt" / "decoder.onnx")
