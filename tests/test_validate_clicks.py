# SPDX-License-Identifier: Apache-2.0
"""``starkv validate clicks`` on the embedded model: right engines pass, damaged ones do not."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command, Outcome
from drawn_suite import use_drawn_suite

from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import load_card
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import load_preset
from starkv.manifest import MANIFEST_NAME, read_manifest, seal, verify_files

MODEL = Path(__file__).resolve().parent.parent / "models" / "gui-tiny"
Validate = Callable[..., Outcome]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of the embedded model, where the command finds them by name."""
    root = tmp_path_factory.mktemp("home")
    found = {}
    for preset in ("fp32", "int8"):
        export_model(MODEL, load_card("gui-tiny"), root / f".{preset}", load_preset(preset))
        found[preset] = root / f"gui-tiny-ort-{preset}"
        build_ort_engine(root / f".{preset}", found[preset])
    return found


@pytest.fixture
def validate(
    starkv: Command, engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Validate:
    use_drawn_suite(monkeypatch)
    monkeypatch.setenv("STARKV_ENGINES", str(engines["fp32"].parent))
    arguments = ("--n", 6, "--max-new-tokens", 16, "--threads", 1)
    return partial(starkv, "validate", "clicks", *arguments)


def checks_of(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for check in report["checks"]:
        found.setdefault(check["subject"], []).append(check)
    return found


def unsealed(engine: Path) -> None:
    """Let an engine's manifest know no hashes."""
    manifest = read_manifest(engine).model_copy(update={"files": {}, "manifest_sha256": ""})
    (engine / MANIFEST_NAME).write_text(seal(manifest))


def test_an_engine_in_fp32_equals_pytorch(validate: Validate, engines: dict[str, Path]) -> None:
    ran = validate("--engine", engines["fp32"], "--task", "both", "--kv-budget", "0.5,1", "--n", 3, "--json")
    assert ran.code == 0, ran.out + ran.err
    report = json.loads(ran.out)
    assert (report["command"], report["schema_version"], report["all_passed"]) == ("validate clicks", 1, True)
    checks = checks_of(report)
    for check in checks["PyTorch"]:
        assert (check["status"], check["reference"]) == ("passed", "PyTorch")
        assert check["measures"]["same_replies"] == check["measures"]["same_clicks"] == 1
    click, _ = checks["PyTorch"]
    assert click["measures"]["accuracy"] == click["measures"]["reference_accuracy"] >= 2 / 3
    assert click["measures"]["difference_low"] < 0 < click["measures"]["difference_high"]
    assert {check["reason"] for check in checks["quantization"]} == {"the engine is in fp32 itself"}
    by_name = {check["implementation"]: check["measures"] for check in checks["compression"][:4]}
    assert list(by_name) == ["native 0.5", "official 0.5", "native 1", "official 1"]
    assert by_name["native 0.5"]["kept_share"] == pytest.approx(0.5, abs=0.02)
    assert by_name["native 1"]["same_replies"] == by_name["native 1"]["kept_share"] == 1
    latency, _ = (check["measures"] for check in checks["latency"])
    for stage in ("vision", "prefill", "compress", "decode_per_token"):
        assert 0 < latency[f"{stage}_ms_median"] <= latency[f"{stage}_ms_p95"]
    memory = {check["implementation"]: check["measures"] for check in checks["memory"][:5]}
    assert memory["native 0.5"]["kv_bytes_kept"] < memory["full"]["kv_bytes_kept"]
    assert memory["full"]["kv_bytes_kept"] == memory["full"]["kv_bytes_full"]

    place = engines["fp32"].with_name("gui-tiny-ort-fp32.clicks")
    assert sorted(path.name for path in place.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((place / "report.json").read_text()) == report
    verify_files(engines["fp32"], read_manifest(engines["fp32"]))
    assert "clicks" not in str(sorted(path.name for path in engines["fp32"].iterdir()))
    page = (place / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r'(src|href)="(?!data:)|@import|url\(|<script', page)
    assert 'class="passed">passed' in page
    markdown = (place / "report.md").read_text()
    for words in (
        "# Clicks of gui-tiny: **passed**",
        "## Against PyTorch",
        "same replies ≥ 98%",
        "## Memory",
    ):
        assert words in markdown


def test_a_quantized_engine_is_compared_with_fp32(validate: Validate, tmp_path: Path) -> None:
    ran = validate(
        "--engine", "gui-tiny", "--task", "click", "--kv-budget", 0.8, "--out", tmp_path / "report"
    )
    assert ran.code == 0, ran.out + ran.err
    for words in (
        "Against PyTorch",
        "What quantization changes",
        "native 0.8",
        "Latency",
        "Memory",
        "passed",
    ):
        assert words in ran.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (check,) = checks_of(report)["quantization"]
    assert (check["reference"], check["status"], check["dtype"]) == ("fp32", "passed", "int8")
    assert check["measures"]["reference_accuracy"] >= 5 / 6


def test_a_damaged_engine_fails(validate: Validate, engines: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(engines["fp32"], damaged)
    weights = np.fromfile(damaged / "decoder.data", np.float32)
    place = slice(len(weights) // 4, 3 * len(weights) // 4)
    weights[place] = weights[place][::-1]
    weights.tofile(damaged / "decoder.data")
    unsealed(damaged)
    ran = validate("--engine", damaged, "--task", "click", "--kv-budget", 0.8, "--json")
    assert ran.code == 1, ran.out + ran.err
    (check,) = checks_of(json.loads(ran.out))["PyTorch"]
    assert check["status"] == "failed"
    assert "of the replies are the same, not 98%" in check["reason"]
    assert "right clicks lost" in check["reason"]
    page = (tmp_path / "damaged.clicks" / "report.html").read_text()
    assert 'class="failed">failed' in page
    assert "miss</span>" in page


def test_what_is_missing_is_left_out_with_a_reason(
    validate: Validate, engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(engines["int8"], alone)
    manifest = read_manifest(alone).model_copy(
        update={"files": {}, "manifest_sha256": "", "name": "made-up", "source": "random weights, seed 0"}
    )
    (alone / MANIFEST_NAME).write_text(seal(manifest))
    options = ("--task", "trajectory", "--kv-budget", 0.5, "--n", 2)
    ran = validate("--engine", alone, *options, "--json")
    assert ran.code == 0, ran.out + ran.err
    checks = checks_of(json.loads(ran.out))
    assert [check["status"] for name in ("PyTorch", "quantization") for check in checks[name]] == [
        "skipped"
    ] * 2
    assert "weights are random" in checks["PyTorch"][0]["reason"]
    assert "there is no engine at" in checks["quantization"][0]["reason"]
    assert "accuracy means nothing here" in (tmp_path / "alone.clicks" / "report.md").read_text()

    monkeypatch.setitem(sys.modules, "starkv.runtime.engines.torch_reference", None)
    ran = validate("--engine", engines["int8"], *options, "--json", "--out", tmp_path / "out")
    assert ran.code == 0, ran.out + ran.err
    (check,) = checks_of(json.loads(ran.out))["PyTorch"]
    assert check["status"] == "skipped"
    assert "is missing; pip install 'starkv[trace]'" in check["reason"]


def test_other_models_get_drawn_desktops(engines: dict[str, Path]) -> None:
    from starkv.cli.click_samples import click_samples

    manifest = read_manifest(engines["int8"]).model_copy(update={"name": "other"})
    first, second = click_samples(manifest, "click", 2, 0), click_samples(manifest, "click", 2, 1)
    assert [sample.facets["task"] for sample in first] == ["desktop", "desktop"]
    assert not {sample.id for sample in first} & {sample.id for sample in second}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-budget", "0.2,x"), "--kv-budget 0.2,x: give numbers over 0 and up to 1"),
        (("--kv-budget", "2"), "a KV budget is a share"),
        (("--reference", "{int8}"), "is quantized as int8; name one in fp32 with --reference"),
        (("--reference", "{fp32}"), "would be compared with itself"),
        (("--reference", "gone"), "engine directory gone does not exist"),
    ],
)
def test_bad_options_are_one_line(
    validate: Validate, engines: dict[str, Path], options: tuple[str, str], message: str
) -> None:
    option, value = options
    ran = validate("--engine", engines["fp32"], option, value.format(**engines), "--out", "report")
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert not Path("report").exists()
