# SPDX-License-Identifier: Apache-2.0
"""``starkv validate engine`` and ``starkv inspect`` of TensorRT engines, on the strict fakes."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import Command
from fake_cuda import FakeCuda
from fake_tensorrt import install
from fake_tensorrt.state import State
from trt_engines import Exports, FakeKernels, build_tensorrt_engine

from starkv.cli.engine_layers import residual_names
from starkv.export.lower import trt_primitives
from starkv.runtime.engines import trt as trt_engine

SUMS = ("layers.*/Add_*", "blocks.*/Add_*")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> State:
    """A fake card that the command finds by itself."""
    state = install(monkeypatch, cuda=FakeCuda())
    kernels: Any = FakeKernels(state.cuda)
    monkeypatch.setattr(trt_engine, "CudaPython", lambda: state.cuda)
    monkeypatch.setattr(trt_engine, "kernels_beside", lambda directory: kernels)
    return state


def checks_of(output: str) -> dict[str, dict[str, Any]]:
    return {check["case"]: check for check in json.loads(output)["checks"]}


@pytest.mark.usefixtures("card")
def test_a_right_engine_passes_layer_by_layer(starkv: Command, exports: Exports, tmp_path: Path) -> None:
    built = build_tensorrt_engine(exports.folders["fp32"], tmp_path / "engine", debug_layers=SUMS)
    done = starkv(
        *("validate", "engine", built, "--reference", exports.processor_engine),
        *("--prompts", 2, "--layers", "--json"),
    )
    assert done.code == 0, done.out + done.err
    report = json.loads(done.out)
    checks = checks_of(done.out)
    assert report["all_passed"]
    assert {"image_embeds", "logits", "decode", "blocks.0", "layers.0", "layers.3"} <= checks.keys()
    assert all(check["dtype"] == "bfloat16" for check in checks.values())
    assert all(0 < checks[f"layers.{layer}"]["measures"]["typical_error"] < 0.02 for layer in range(4))


@pytest.mark.usefixtures("card")
def test_a_wrong_lowering_is_found(
    starkv: Command, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other windows are not hidden from the vision tower."""
    monkeypatch.setattr(trt_primitives, "HIDDEN", 0.0)
    built = build_tensorrt_engine(exports.folders["fp32"], tmp_path / "engine", debug_layers=SUMS)
    done = starkv(
        *("validate", "engine", built, "--reference", exports.processor_engine),
        *("--prompts", 2, "--layers", "--json"),
    )
    assert done.code == 1
    failed = {case: check for case, check in checks_of(done.out).items() if check["status"] == "failed"}
    assert failed.keys() == {"blocks.0"}
    assert failed["blocks.0"]["reason"].startswith("the first layer of the vision tower that differs")


@pytest.mark.usefixtures("card")
def test_layers_must_have_been_built_to_be_seen(starkv: Command, exports: Exports, tmp_path: Path) -> None:
    built = build_tensorrt_engine(exports.folders["fp32"], tmp_path / "engine")
    done = starkv(
        *("validate", "engine", built, "--reference", exports.processor_engine, "--prompts", 1, "--layers")
    )
    assert done.code == 2
    assert "build it with --debug-layers" in done.err


@pytest.mark.usefixtures("card")
def test_inspect_shows_plans_and_times_layers(starkv: Command, exports: Exports, tmp_path: Path) -> None:
    built = build_tensorrt_engine(exports.folders["fp32"], tmp_path / "engine")
    done = starkv("inspect", built, "--timings", 2, "--json")
    assert done.code == 0, done.out + done.err
    content = json.loads(done.out)
    plans = {plan["name"]: plan for plan in content["plans"]}
    assert plans.keys() == {"vision", "decoder", "compress"}
    embeds = next(row for row in plans["decoder"]["tensors"] if row["name"] == "inputs_embeds")
    assert embeds["is_input"]
    prefill, decode = embeds["ranges"]
    assert prefill[2][1] == content["tensorrt"]["prefill_rows"]
    assert decode[2][:2] == [content["tensorrt"]["sessions"], 1]
    times = content["layer_milliseconds"]
    assert times.keys() == {"vision", "decoder.prefill", "decoder.decode", "compress"}
    assert all(sum(layers.values()) > 0 for layers in times.values())
    assert times["decoder.decode"].keys() == times["decoder.prefill"].keys()
    assert len(times["vision"]) == plans["vision"]["layers"]

    shown = starkv("inspect", built, "--timings", 1)
    assert shown.code == 0, shown.out + shown.err
    for words in ("TensorRT 10.3", "decoder.plan", "past_k.i", "decoder.prefill:", "%"):
        assert words in shown.out


def test_inspect_without_a_card_shows_what_the_build_wrote(
    starkv: Command, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        install(there, cuda=FakeCuda())
        built = build_tensorrt_engine(exports.folders["fp32"], tmp_path / "engine")
    done = starkv("inspect", built)
    assert done.code == 0, done.out + done.err
    assert "TensorRT 10.3" in done.out
    assert "can't be opened here" in done.err
    timed = starkv("inspect", built, "--timings", 1)
    assert timed.code != 0
    assert "can't be timed here" in timed.err


def test_other_engines_have_no_layer_timings(starkv: Command, exports: Exports) -> None:
    done = starkv("inspect", exports.processor_engine, "--timings", 1)
    assert done.code == 2
    assert "no TensorRT engine" in done.err


def test_a_layer_is_its_last_sum() -> None:
    names = ["layers.1/Add_0.0", "layers.1/Add_10.0", "layers.1/Add_9.0", "blocks.0/Add_3.0", "head/Add_1.0"]
    assert residual_names([*names, "layers.0/Mul_4.0"]) == {
        "blocks.0": "blocks.0/Add_3.0",
        "layers.1": "layers.1/Add_10.0",
    }
