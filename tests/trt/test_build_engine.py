# SPDX-License-Identifier: Apache-2.0
"""``starkv build --backend trt`` where all goes well: what TensorRT is told, and what lies there after."""

import os
from pathlib import Path
from typing import Any

import pytest
from command import Command
from conftest import TinyModel
from scripted_builder import Script, builder_machine, install

from starkv.cli.engines import engine_directory
from starkv.export.build.trt import build_trt_engine
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.manifest import MANIFEST_NAME, read_manifest, verify_files

SIDE_FILES = {
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("generation_config.json", "embedding.safetensors", "compact.onnx", "score_window.onnx"),
}
PLANS = {"vision.plan", "decoder.plan", "compress.plan"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    return builder_machine(monkeypatch, tmp_path)


def test_engine_directory_is_complete_and_describes_itself(
    script: Script, starkv: Command, tiny: TinyModel
) -> None:
    done = starkv("build", tiny.exports["int4"], "--sessions", "2", "--prefill-rows", "128")
    assert done.code == 0, done.err
    assert "backend trt: --sessions is about its engines" in done.err
    assert "TensorRT 10.3.0.26 on NVIDIA H100, bfloat16" in done.err
    engine = Path(done.out.strip())
    assert engine == engine_directory("tiny", "trt", "int4")
    manifest = read_manifest(engine)
    verify_files(engine, manifest)
    expected = SIDE_FILES | PLANS | {"libstarkv_trt.so", "libstarkv_kernels.so"}
    assert set(manifest.files) == expected
    assert {path.name for path in engine.iterdir()} == expected | {MANIFEST_NAME}
    assert (manifest.backend, manifest.compute_dtype) == ("trt", "bfloat16")
    build = manifest.tensorrt
    assert build is not None
    assert (build.version, build.cuda, build.gpu) == ("10.3.0.26", "13.0", "NVIDIA H100")
    assert (build.compute_capability, build.hardware_compatibility) == ("9.0", "none")
    assert (build.sessions, build.prefill_rows, build.cache_rows) == (2, 128, 512)
    assert not build.stripped
    assert not build.weight_streaming
    assert build.scratch_bytes == {
        "vision": 1000,
        "decoder.prefill": 1000,
        "decoder.decode": 2000,
        "compress": 1000,
    }
    assert set(build.graphs) == set(build.weight_bytes) == {"vision", "decoder", "compress"}
    assert build.weight_bytes["decoder"] > build.weight_bytes["compress"] == 0
    assert manifest.tool_versions["tensorrt"] == "10.3.0.26"
    assert [path.name for path in Path("engines").iterdir()] == [engine.name]


def test_tensorrt_is_told_what_was_asked_for(script: Script, starkv: Command, tiny: TinyModel) -> None:
    done = starkv(
        *("build", tiny.exports["int4"], "--backend", "trt", "--workspace", "0.5", "--strip-weights"),
        *("--weight-streaming", "--optimization-level", "0", "--hardware-compatibility", "ampere_plus"),
        *("--debug-layers", "layers.1/*"),
    )
    assert done.code == 0, done.err
    assert script.words("network") == [(2,)] * 3
    assert script.words("parse") == [("vision.onnx",), ("decoder.onnx",), ("compress.onnx",)]
    assert script.words("library") == [
        (str(Path(os.environ["STARKV_KERNELS"]).with_name("libstarkv_trt.so")),)
    ]
    assert script.words("preview") == [("ALIASED_PLUGIN_IO_10_03", True)] * 2
    assert script.words("pool") == [("WORKSPACE", 1 << 29)] * 3
    stripped = ["STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING"] * 2
    assert [flag for (flag,) in script.words("flag")] == stripped
    settings: dict[str, list[Any]] = {}
    for name, value in script.words("set"):
        settings.setdefault(name, []).append(value)
    assert settings["builder_optimization_level"] == [0] * 3
    assert [level.name for level in settings["hardware_compatibility_level"]] == ["AMPERE_PLUS"] * 3
    assert {level.name for level in settings["profiling_verbosity"]} == {"DETAILED"}
    assert len(script.words("profile")) == 4
    debug = [name for (name,) in script.words("debug")]
    assert debug
    assert all(name.startswith("layers.1/") for name in debug)
    engine = Path(done.out.strip())
    manifest = read_manifest(engine)
    assert manifest.tensorrt is not None
    assert manifest.tensorrt.stripped
    # What weights are read from when the engine opens; the compression has none.
    kept = {path.name for path in engine.glob("*.onnx")} | {path.name for path in engine.glob("*.data")}
    assert kept == {
        *("vision.onnx", "vision.data", "decoder.onnx", "decoder.data"),
        *("compact.onnx", "score_window.onnx"),
    }


def test_plans_are_streamed_where_tensorrt_can(
    script: Script, monkeypatch: pytest.MonkeyPatch, tiny: TinyModel, tmp_path: Path
) -> None:
    build_trt_engine(tiny.exports["fp32"], tmp_path / "old", TrtBuildOptions())
    assert script.words("built") == [("whole",)] * 3
    script.version = "10.16.1.11"
    script.told.clear()
    install(monkeypatch, script)
    options = TrtBuildOptions(hardware_compatibility="same_compute_capability")
    build_trt_engine(tiny.exports["fp32"], tmp_path / "new", options)
    assert script.words("built") == [("streamed",)] * 3
    levels = [value.name for name, value in script.words("set") if name == "hardware_compatibility_level"]
    assert levels == ["SAME_COMPUTE_CAPABILITY"] * 3
    assert (tmp_path / "new" / "vision.plan").read_bytes() == b"plan of 1" * 3


def test_measured_kernels_serve_the_next_build(script: Script, tiny: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "measured"
    options = TrtBuildOptions(timing_directory=folder)
    build_trt_engine(tiny.exports["fp32"], tmp_path / "engine", options)
    (path,) = folder.iterdir()
    assert path.name == "10.3.0.26-sm90-cuda13.0-nvidia-h100.timing"
    # The second plan began with what the first had measured, and so on.
    begun = [content for (content,) in script.words("cache")]
    assert begun[0] == b""
    assert b"measured" in begun[1]
    for useless in (b"damaged", b"other card"):
        path.write_bytes(useless)
        script.told.clear()
        build_trt_engine(tiny.exports["fp32"], tmp_path / "engine", options)
        assert script.words("cache")[0] == (b"",)


def test_measured_kernels_that_can_not_be_kept_cost_nothing_else(
    script: Script, tiny: TinyModel, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    options = TrtBuildOptions(timing_directory=tmp_path / "file")
    build_trt_engine(tiny.exports["fp32"], tmp_path / "engine", options)


class CountingProgress:
    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, list[str]]] = {}

    def start(self, stage: str, total: int) -> None:
        self.items: list[str] = []
        self.stages[stage] = (total, self.items)

    def advance(self, item: str) -> None:
        self.items.append(item)


def test_progress_reaches_its_totals(script: Script, tiny: TinyModel, tmp_path: Path) -> None:
    progress = CountingProgress()
    build_trt_engine(tiny.exports["fp32"], tmp_path / "engine", TrtBuildOptions(), progress)
    assert list(progress.stages) == ["lowering", "vision.plan", "decoder.plan", "compress.plan", "engine"]
    for total, items in progress.stages.values():
        assert len(items) == total > 0
    assert progress.stages["decoder.plan"][1].count("Building engine") == 50
