# SPDX-License-Identifier: Apache-2.0
"""What is settled of an engine for TensorRT before TensorRT is asked: sizes, settings, command lines."""

import json
import shlex
import subprocess
from pathlib import Path

import onnx
import pytest
from command import Command
from conftest import TinyModel

from starkv.errors import UsageError
from starkv.export.build.trt_commands import SCRIPT_NAME, trtexec_command, trtexec_script
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.export.build.trt_plan import BuildPlan, plan_trt_build
from starkv.export.build.trt_profiles import SizeRange, graph_profiles
from starkv.trt_compat.building import ShapeRange
from starkv.trt_compat.version import OLDEST


def planned(tiny: TinyModel, out: Path, options: TrtBuildOptions, preset: str = "int4") -> BuildPlan:
    out.mkdir(exist_ok=True)
    return plan_trt_build(tiny.exports[preset], out, OLDEST, "bfloat16", options)


@pytest.fixture
def plan(tiny: TinyModel, tmp_path: Path) -> BuildPlan:
    return planned(tiny, tmp_path / "lowered", TrtBuildOptions(sessions=3, prefill_rows=128))


def test_every_input_has_shapes_between_which_it_may_be(plan: BuildPlan) -> None:
    assert [engine.plan_name for engine in plan.engines] == ["vision.plan", "decoder.plan", "compress.plan"]
    for engine in plan.engines:
        inputs = onnx.load(engine.graph.path, load_external_data=False).graph.input
        for profile in engine.profiles:
            assert set(profile) == {value.name for value in inputs}
            for value in inputs:
                shape = profile[value.name]
                dims = value.type.tensor_type.shape.dim
                assert len(shape.least) == len(shape.usual) == len(shape.most) == len(dims)
                for dim, *sizes in zip(dims, shape.least, shape.usual, shape.most, strict=True):
                    assert 0 < sizes[0] <= sizes[1] <= sizes[2]
                    assert not dim.dim_value or set(sizes) == {dim.dim_value}


def test_decoder_has_one_profile_for_prompts_and_one_for_tokens(plan: BuildPlan) -> None:
    prefill, decode = plan.engines[1].profiles
    assert prefill["inputs_embeds"] == ShapeRange((1, 1, 256), (1, 128, 256), (1, 128, 256))
    assert decode["inputs_embeds"] == ShapeRange((1, 1, 256), (1, 1, 256), (3, 1, 256))
    assert prefill["past_k.1"] == ShapeRange((1, 2, 64, 64), (1, 2, 512, 64), (1, 2, 512, 64))
    assert decode["past_v.0"].most == (3, 2, 512, 64)
    assert decode["kv_len"] == ShapeRange((2, 1), (2, 1), (2, 3))
    assert plan.cache_rows == 512


def test_compression_takes_every_slot_and_screenshot(plan: BuildPlan) -> None:
    (profile,) = plan.engines[2].profiles
    assert profile["dst_k"].most == (2, 3, 2, 512, 64)
    assert profile["q_window"].least == (2, 1, 4, 1, 64)
    assert profile["q_window"].most == (2, 1, 4, 8, 64)
    assert profile["parameters"].least == profile["parameters"].most == (23,)
    tokens = plan.engines[0].profiles[0]["unpad_idx"].most[0]
    assert profile["pattern_ema"].most == (2, 1, 2, tokens)
    assert plan.image_patches == 4 * tokens


def test_settings_follow_from_the_graph(tiny: TinyModel, tmp_path: Path) -> None:
    options = TrtBuildOptions(strip=True, weight_streaming=True, workspace=1 << 30, optimization_level=5)
    settings = {
        engine.graph.name: engine.settings for engine in planned(tiny, tmp_path / "x", options).engines
    }
    assert {name: each.aliased for name, each in settings.items()} == {
        "vision": False,
        "decoder": True,
        "compress": True,
    }
    # It has no weights to leave out.
    assert {name: (each.strip, each.weight_streaming) for name, each in settings.items()} == {
        "vision": (True, True),
        "decoder": (True, True),
        "compress": (False, False),
    }
    assert {each.workspace for each in settings.values()} == {1 << 30}
    assert {each.optimization_level for each in settings.values()} == {5}


def test_limits_are_lowered_but_never_raised(tiny: TinyModel, tmp_path: Path) -> None:
    plan = planned(tiny, tmp_path / "x", TrtBuildOptions(max_context=100, max_pixels=10_000))
    assert plan.cache_rows == 128
    assert plan.record.max_context == 100
    assert plan.record.image.max_pixels == 10_000
    # A prefill call is no longer than a cache.
    assert plan.options.prefill_rows == 128
    for change, words in (
        ({"max_context": 513}, "--max-context is 513, but tiny was exported for 512"),
        ({"max_context": 8}, "no more than the 8 rows"),
        ({"max_pixels": 50_177}, "--max-pixels is 50177, but tiny takes 3136 to 50176"),
        ({"max_pixels": 3135}, "--max-pixels is 3135"),
        ({"prefill_rows": 7}, "--prefill-rows is 7"),
        ({"debug_layers": ("nothing*",)}, r"--debug-layers nothing\* fits no tensor"),
    ):
        with pytest.raises(UsageError, match=words):
            planned(tiny, tmp_path / str(change), TrtBuildOptions(**change))  # type: ignore[arg-type]


def test_debug_layers_name_results_but_no_weights(tiny: TinyModel, tmp_path: Path) -> None:
    plan = planned(tiny, tmp_path / "x", TrtBuildOptions(debug_layers=("layers.0/*", "merger/*")))
    vision, decoder, compress = (engine.settings.debug_tensors for engine in plan.engines)
    assert all(name.startswith("layers.0/") for name in decoder)
    assert all(name.startswith("merger/") for name in vision)
    assert vision
    assert not compress
    nodes = onnx.load(plan.engines[1].graph.path, load_external_data=False).graph.node
    kinds = {name: node.op_type for node in nodes for name in node.output}
    assert "MatMul" in {kinds[name] for name in decoder}
    assert "DequantizeLinear" not in {kinds[name] for name in decoder}


def test_an_input_without_sizes_is_a_mistake_of_ours(plan: BuildPlan) -> None:
    with pytest.raises(ValueError, match="inputs_embeds has a dimension 'S'"):
        graph_profiles(plan.engines[1].graph.path, ({"B": SizeRange(1, 1, 1)},))


def test_trtexec_is_told_the_same(tiny: TinyModel, tmp_path: Path) -> None:
    options = TrtBuildOptions(
        strip=True, workspace=3 << 29, hardware_compatibility="ampere_plus", prefill_rows=128
    )
    plan = planned(tiny, tmp_path / "x", options)
    command = shlex.split(trtexec_command(plan.engines[1]))
    for argument in (
        "--onnx=decoder.onnx",
        "--saveEngine=decoder.plan",
        "--stronglyTyped",
        "--dynamicPlugins=./libstarkv_trt.so",
        "--preview=+aliasedPluginIO1003",
        "--memPoolSize=workspace:1536M",
        "--stripWeights",
        "--hardwareCompatibilityLevel=ampere+",
    ):
        assert argument in command
    first, second = command.index("--profile=0"), command.index("--profile=1")
    assert "inputs_embeds:1x1x256," in command[first + 1]
    assert "inputs_embeds:1x128x256," in command[first + 3]
    assert "past_k.0:8x2x512x64" in command[second + 3]
    assert "--preview=+aliasedPluginIO1003" not in shlex.split(trtexec_command(plan.engines[0]))
    assert "--dynamicPlugins=/x/y.so" in trtexec_command(plan.engines[0], Path("/x/y.so"))
    script = tmp_path / "script.sh"
    script.write_text(trtexec_script(plan))
    subprocess.run(["sh", "-n", str(script)], check=True)


def test_dry_run_works_anywhere_and_leaves_nothing(starkv: Command, tiny: TinyModel) -> None:
    done = starkv("build", tiny.exports["int8"], "--target-version", "10.3", "--dry-run")
    assert done.code == 0, done.err
    assert "backend trt: --dry-run is about its engines" in done.err
    assert "in 16 bits, twice the memory: decoder and head" in done.err
    assert "tiny (int8) for TensorRT 10.3 in bfloat16" in done.out
    assert "cache rows 64 (512) 512" in done.out
    assert not list(Path().iterdir())
    as_json = starkv(
        "build", tiny.exports["int4"], "--target-version", "11.1", "--dry-run", "--json", "--sessions", "2"
    )
    described = json.loads(as_json.out)
    assert described["target"] == "11.1"
    assert described["sessions"] == 2
    assert described["cache_rows"] == 512
    assert [each["name"] for each in described["plans"]] == ["vision.plan", "decoder.plan", "compress.plan"]
    assert described["plans"][1]["profiles"][1]["kv_len"]["most"] == [2, 2]
    assert sum(each["weight_bytes"] for each in described["plans"]) == described["weight_bytes"]
    assert not list(Path().iterdir())


def test_dry_run_with_a_place_keeps_the_graphs_and_how_to_build_them(
    starkv: Command, tiny: TinyModel
) -> None:
    out = Path("plan")
    for _ in range(2):
        assert starkv("build", tiny.exports["fp32"], "--dry-run", "--out", out).code == 0
    assert {path.name for path in out.iterdir()} == {
        *("vision.onnx", "vision.data", "decoder.onnx", "decoder.data", "compress.onnx"),
        SCRIPT_NAME,
    }
    assert (out / SCRIPT_NAME).stat().st_mode & 0o111
    (out / SCRIPT_NAME).unlink()
    refused = starkv("build", tiny.exports["fp32"], "--dry-run", "--out", out)
    assert refused.code == 2
    assert "is not overwritten" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backend", "ort", "--sessions", "2"), "--sessions is about engines of --backend trt"),
        (("--backend", "ort", "--dry-run"), "--dry-run is about engines of --backend trt"),
        (("--backend", "ort", "--optimization-level", "0"), "--optimization-level is about engines"),
        (("--backend", "trt", "--prepack"), "--prepack is about engines of --backend ort"),
        (("--backend", "trt", "--device", "cuda"), "--device is about engines of --backend ort"),
        (("--prepack", "--strip-weights"), "leave one out"),
        (("--backend", "onnx"), "unknown backend 'onnx'; known: auto, ort, trt"),
        (("--backend", "ort", "--json"), "--json is about the plan that --dry-run makes"),
        (("--dry-run", "--target-version", "9.3"), "TensorRT 9.3 is not supported"),
        (("--dry-run", "--target-version", "12.0"), "TensorRT 12.0 is not supported"),
        (("--dry-run", "--target-version", "new"), "'new' is no TensorRT version"),
        (("--dry-run", "--compute-dtype", "float32"), "computes in bfloat16 or float16, not in float32"),
        (("--dry-run", "--hardware-compatibility", "all"), "unknown --hardware-compatibility 'all'"),
        (
            ("--dry-run", "--target-version", "10.3", "--hardware-compatibility", "same_compute_capability"),
            "use --hardware-compatibility none or ampere_plus",
        ),
        (("--dry-run", "--workspace", "0"), "--workspace is 0, but must be at least 1"),
        (("--dry-run", "--max-context", "100000"), "was exported for 512"),
        (("--dry-run", "--quant", "int8"), "was exported as int4, not int8"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    starkv: Command, tiny: TinyModel, arguments: tuple[str, ...], words: str
) -> None:
    refused = starkv("build", tiny.exports["int4"], *arguments)
    assert refused.code == 2
    assert words in refused.err
    assert refused.err.count("error:") == 1
    assert "Traceback" not in refused.err
    assert not list(Path().iterdir())
