# SPDX-License-Identifier: Apache-2.0
"""Building an engine for TensorRT that keeps codes: the graph, its sizes, its scales, how it is found."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command import Command
from conftest import TinyModel
from fake_cuda import FakeCuda
from packed_cases import PackedEngines
from packed_engines import write_prompts
from runtime_cases import Engines, Kernels
from scripted_builder import builder_machine

from starkv.cli.console import progress
from starkv.cli.engines import engine_directory, find_engine
from starkv.cli.trt_packing import with_scales
from starkv.errors import UsageError
from starkv.export.build.trt_options import POSITION_ROWS, TrtBuildOptions
from starkv.export.build.trt_plan import BuildPlan, plan_trt_build
from starkv.export.lower.attention_weights import projection_biases
from starkv.kv_packing.file import PACKING_NAME, load_packing
from starkv.kv_packing.options import PackingOptions
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.manifest import Manifest, read_manifest, seal, verify_files
from starkv.runtime.engines import trt as trt_engine
from starkv.runtime.engines.ort import OrtEngine
from starkv.trt_compat.building import ShapeRange
from starkv.trt_compat.version import OLDEST


@pytest.fixture
def plan(tiny: TinyModel, tmp_path: Path) -> BuildPlan:
    out = tmp_path / "lowered"
    out.mkdir()
    options = TrtBuildOptions(sessions=3, prefill_rows=128, kv_bits=4)
    return plan_trt_build(tiny.exports["int4"], out, OLDEST, "bfloat16", options)


def test_each_layer_has_both_caches(plan: BuildPlan, tiny: TinyModel) -> None:
    graph = onnx.load(plan.engines[1].graph.path, load_external_data=False).graph
    nodes = [node for node in graph.node if "KVAttention" in node.op_type]
    assert [node.op_type for node in nodes] == ["PackableKVAttention"] * 2
    assert {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}["bits"] == 4
    assert plan.engines[1].settings.aliased
    outputs = {value.name for value in graph.output}
    assert {"present_k_codes.1", "present_v_codes.0", "present_k.1", "logits"} <= outputs


def test_codes_have_sizes_of_their_own(plan: BuildPlan) -> None:
    prefill, decode = plan.engines[1].profiles
    # Four bytes of eight codes: 64 channels are 8 integers.
    assert prefill["past_k_codes.1"] == ShapeRange((1, 2, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8))
    assert decode["past_k_codes.1"] == ShapeRange((1, 2, 1, 8), (1, 2, 512, 8), (3, 2, 512, 8))
    assert decode["row_positions.0"] == ShapeRange((1, 1, 3), (1, 512, 3), (3, 512, 3))
    assert decode["k_bias.0"] == ShapeRange((128,), (128,), (128,))
    assert decode["cos_table"] == ShapeRange((1, 32), (4096, 32), (POSITION_ROWS, 32))
    assert prefill["sin_table"].most == (1, 32)
    assert plan.position_rows == POSITION_ROWS


def test_biases_of_an_export_are_those_of_its_engine(tiny: TinyModel) -> None:
    folders = (tiny.exports["int4"], tiny.exports["fp32"], tiny.engine)
    pairs = [projection_biases(ir.load(folder / "decoder.onnx")) for folder in folders]
    for quantized, floats, engine in zip(*pairs, strict=True):
        np.testing.assert_array_equal(quantized, engine)
        np.testing.assert_array_equal(floats, engine)
        assert np.abs(engine[0]).max() > 0


@pytest.fixture
def packed(engines: Engines, host: OrtEngine) -> PackedEngines:
    return PackedEngines(engines, host)


def machine(packed: PackedEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a machine with the card and the kernels that commands find by themselves."""
    state = packed.engines.install(cuda=FakeCuda())
    monkeypatch.setattr(trt_engine, "CudaPython", lambda: state.cuda)
    monkeypatch.setattr(trt_engine, "kernels_beside", lambda directory: Kernels(state.cuda))


def test_an_engine_measures_its_own_scales(
    packed: PackedEngines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on the processor, within what 16 bits leave."""
    machine(packed, monkeypatch)
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    write_prompts(prompts)
    directory = shutil.copytree(packed.directory(8), tmp_path / "engine")
    manifest = read_manifest(directory)
    files = {name: digest for name, digest in manifest.files.items() if name != PACKING_NAME}
    plain = manifest.model_copy(update={"kv_packing": None, "files": files})
    (directory / PACKING_NAME).unlink()
    (directory / "manifest.json").write_text(seal(plain))
    with progress() as stages:
        with_scales(packed.exported, directory, plain, prompts, stages)
    made = read_manifest(directory)
    verify_files(directory, made)
    assert made.kv_packing is not None
    assert made.kv_packing.describe() == "int8"
    assert made.kv_packing.calibration_tokens == packed.statistics.tokens
    ours, theirs = load_packing(directory / PACKING_NAME), packed.packing(8)
    assert isinstance(ours, QuantizedPacking)
    for own, expected in zip(ours.layers, theirs.layers, strict=True):
        np.testing.assert_allclose(own.key_scales, expected.key_scales, rtol=0.1)
        np.testing.assert_allclose(own.value_bias, expected.value_bias, rtol=1e-6)


def test_scales_can_be_measured_again(
    packed: PackedEngines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, starkv: Command
) -> None:
    machine(packed, monkeypatch)
    engine, out = packed.directory(8), tmp_path / "again"
    prompts = write_prompts(tmp_path, 4)
    asked = ("pack", engine, "--kv-quant", "int8", "--calibration", prompts)
    done = starkv(*asked, "--out", out)
    assert (done.code, done.out) == (0, f"{out}\n")
    manifest = read_manifest(out)
    verify_files(out, manifest)
    assert manifest.kv_packing is not None
    assert 0 < manifest.kv_packing.calibration_tokens < packed.statistics.tokens
    assert (out / "decoder.plan").stat().st_ino == (engine / "decoder.plan").stat().st_ino
    refused = starkv(*asked)
    assert refused.code == 2
    assert "packs already; give --out for one with other scales" in refused.err
    refused = starkv("pack", engine, "--kv-quant", "int4", "--out", tmp_path / "other")
    assert "was built for int8, not for int4; what a TensorRT engine keeps is settled" in refused.err
    refused = starkv("pack", packed.engines.directory(), "--kv-quant", "int8", "--out", tmp_path / "other")
    assert "was built for rows as they are, not for int8" in refused.err
    assert not (tmp_path / "other").exists()


def test_the_command_builds_and_finds_it_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, starkv: Command, tiny: TinyModel
) -> None:
    builder_machine(monkeypatch, tmp_path)
    measured = []

    def without_a_card(exported: Path, engine: Path, manifest: Manifest, *rest: object) -> Manifest:
        measured.append(manifest.tensorrt)
        return manifest

    monkeypatch.setattr("starkv.cli.trt_build.with_scales", without_a_card)
    compiled = engine_directory("gui-tiny", "trt", "int8").with_name("gui-tiny-trt-int8-kv-int4")
    done = starkv("build", tiny.exports["int8"], "--backend", "trt", "--kv-quant", "int4", "--out", compiled)
    assert done.code == 0
    assert [build.kv_bits for build in measured if build] == [4]
    assert find_engine("gui-tiny", "int8", packing=PackingOptions("int4")) == compiled
    refused = starkv("build", tiny.exports["int8"], "--backend", "trt", "--kv-rank", "0.5")
    assert refused.code == 2
    assert "--kv-rank is about engines of --backend ort; leave it out" in refused.err
    with pytest.raises(UsageError, match="on GPUs packed caches run in TensorRT"):
        find_engine("gui-tiny", "int8", "cuda", PackingOptions("int8"))


def test_a_dry_run_plans_both_caches(starkv: Command, tiny: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    asked = ("--backend", "trt", "--kv-quant", "int8", "--dry-run", "--out", out)
    done = starkv("build", tiny.exports["fp32"], *asked)
    assert done.code == 0
    said = " ".join(done.out.split())
    # Two layers of two heads of 64, keys and values, and three integers in each layer.
    assert "kept rows as int8, 536 bytes per token with its positions, in up to 32,768 positions" in said
    assert "rows of codes 1 (512) 512, positions 1 (4,096) 32,768" in said
    script = (out / "trtexec.sh").read_text()
    assert "past_k_codes.0:1x2x1x16" in script
    assert "row_positions.1:8x512x3" in script
