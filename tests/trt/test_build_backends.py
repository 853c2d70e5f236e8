# SPDX-License-Identifier: Apache-2.0
"""Which backend is built, and which of a model's engines is taken."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Command
from conftest import TinyModel
from scripted_builder import H100, Script, builder_machine, install

from starkv.cli.backends import reason_not_to_run
from starkv.cli.doctor_tensorrt import plugins_row, tensorrt_row
from starkv.cli.engines import engine_directory, find_engine
from starkv.export.build.trt import build_trt_engine
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.gpu import Gpu


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    return builder_machine(monkeypatch, tmp_path)


@pytest.mark.parametrize("missing", ["tensorrt", "gpu", "plugins"])
def test_auto_needs_all_and_says_what_is_missing(
    script: Script, monkeypatch: pytest.MonkeyPatch, starkv: Command, tiny: TinyModel, missing: str
) -> None:
    done = starkv("build", tiny.exports["fp32"])
    assert "backend trt: TensorRT, a GPU and the plugins are here" in done.err
    shutil.rmtree("engines")
    if missing == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        words = "TensorRT is not installed"
    elif missing == "gpu":
        monkeypatch.setattr("starkv.gpu.find_gpu", lambda index=0: None)
        words = "no NVIDIA GPU here"
    else:
        monkeypatch.setenv("STARKV_KERNELS", "elsewhere/x.so")
        words = "libstarkv_trt.so is not built"
    refused = starkv("build", tiny.exports["fp32"], "--backend", "trt")
    assert refused.code == 2
    assert words in refused.err
    done = starkv("build", tiny.exports["fp32"])
    assert done.code == 0
    assert "backend ort: none for TensorRT can be built here (" in done.err
    assert words in done.err


def test_a_models_engine_is_tensorrts_where_it_fits(
    script: Script, monkeypatch: pytest.MonkeyPatch, starkv: Command, tiny: TinyModel
) -> None:
    compiled = engine_directory("gui-tiny", "trt", "int8")
    for directory, backend in ((compiled, "trt"), (engine_directory("gui-tiny", "ort", "int8"), "ort")):
        assert starkv("build", tiny.exports["int8"], "--backend", backend, "--out", directory).code == 0
    assert find_engine("gui-tiny") == compiled
    assert find_engine("gui-tiny", device="cuda") == compiled
    assert find_engine("gui-tiny", device="cpu") == engine_directory("gui-tiny", "ort", "int8")
    script.version = "10.3.0.30"
    install(monkeypatch, script)
    assert find_engine("gui-tiny") == engine_directory("gui-tiny", "ort", "int8")
    assert reason_not_to_run(compiled) == "built with TensorRT 10.3.0.26, 10.3.0.30 is installed"


@pytest.mark.parametrize(
    ("level", "gpu", "fits"),
    [
        ("none", H100, True),
        ("none", Gpu("NVIDIA H200", (9, 0), 0, (13, 0)), False),
        ("same_compute_capability", Gpu("NVIDIA H200", (9, 0), 0, (13, 0)), True),
        ("same_compute_capability", Gpu("A100", (8, 0), 0, (13, 0)), False),
        ("ampere_plus", Gpu("A100", (8, 0), 0, (13, 0)), True),
        ("ampere_plus", Gpu("T4", (7, 5), 0, (13, 0)), False),
        ("none", None, False),
    ],
)
def test_where_an_engine_runs(
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    tiny: TinyModel,
    tmp_path: Path,
    level: Any,
    gpu: Gpu | None,
    fits: bool,
) -> None:
    script.version = "10.16.1.11"
    install(monkeypatch, script)
    build_trt_engine(tiny.exports["fp32"], tmp_path / "engine", TrtBuildOptions(hardware_compatibility=level))
    monkeypatch.setattr("starkv.gpu.find_gpu", lambda index=0: gpu)
    assert (reason_not_to_run(tmp_path / "engine") is None) == fits
    assert "is no engine for TensorRT" in str(reason_not_to_run(tiny.engine)) or gpu is None


def test_doctor_says_what_is_missing(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    find_gpu = "starkv.cli.doctor_tensorrt.find_gpu"
    monkeypatch.setattr(find_gpu, lambda: H100)
    assert tensorrt_row() == (True, "10.3.0.26", "build an engine: starkv build MODEL --backend trt")
    assert plugins_row()[0]
    assert plugins_row()[1].endswith("libstarkv_trt.so, CUDA 13.0")
    monkeypatch.setattr(find_gpu, lambda: Gpu("Orin", (8, 7), 0, (12, 6)))
    usable, _, advice = plugins_row()
    assert not usable
    assert "build the plugins with CUDA 12" in advice
    monkeypatch.setattr(find_gpu, lambda: None)
    assert not plugins_row()[0]
    assert tensorrt_row()[2].startswith("no GPU")
    monkeypatch.setenv("STARKV_KERNELS", "elsewhere/x.so")
    assert plugins_row() == (False, "not built", "needed only for TensorRT engines: `make plugin`")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT is not installed" in tensorrt_row()[2]
