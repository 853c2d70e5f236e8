# SPDX-License-Identifier: Apache-2.0
"""``starkv validate engine`` on engines of ONNX Runtime: right ones pass, wrong ones do not."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
from command import Command

from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import load_card
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import load_preset

MODEL = Path(__file__).resolve().parent.parent / "models" / "gui-tiny"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("engines"), {}
    for preset in ("fp32", "int4"):
        export_model(MODEL, load_card("gui-tiny"), root / f"{preset}-export", load_preset(preset))
        build_ort_engine(root / f"{preset}-export", root / preset)
        found[preset] = root / preset
    return found


def wrong(engine: Path, folder: Path, graph: str, change: "object") -> Path:
    """A copy of an engine with one graph changed."""
    shutil.copytree(engine, folder)
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    change(model)  # type: ignore[operator]
    onnx.save(model, folder / f"{graph}.onnx")
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"] = {}
    content["manifest_sha256"] = ""
    manifest.write_text(json.dumps(content))
    return folder


def test_an_engine_equals_pytorch(starkv: Command, engines: dict[str, Path], tmp_path: Path) -> None:
    done = starkv(
        *("validate", "engine", engines["fp32"], "--against", "torch", "--checkpoint", MODEL),
        *("--prompts", 2, "--json", "--out", tmp_path / "report.json"),
    )
    assert done.code == 0, done.out + done.err
    report = json.loads(done.out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["all_passed"]
    cases = {check["case"]: check for check in report["checks"]}
    assert {"image_embeds", "logits", "keys", "values", "q_window", "hidden_norm", "decode"} < cases.keys()
    assert cases["kept_rows"]["measures"]["kept_agreement"] == 1.0
    assert max(check["measures"].get("error", 0) for check in report["checks"]) < 1e-3


def test_quantized_weights_are_held_to_logits_only(
    starkv: Command, engines: dict[str, Path], tmp_path: Path
) -> None:
    saved, table = tmp_path / "outputs.json", tmp_path / "report.md"
    done = starkv(
        *("validate", "engine", engines["int4"], "--reference", engines["fp32"], "--prompts", 1, "--layers"),
        *("--save-polygraphy", saved, "--out", table, "--json"),
    )
    assert done.code == 0, done.out + done.err
    checks = {check["case"]: check for check in json.loads(done.out)["checks"]}
    assert checks["keys"]["status"] == "skipped"
    assert checks["logits"]["status"] == "passed"
    assert {"blocks.0", "blocks.1", "layers.0", "layers.3"} <= checks.keys()
    assert checks["layers.0"]["measures"]["error"] < checks["layers.3"]["measures"]["error"]
    assert saved.stat().st_size > 1000
    assert table.read_text().startswith("# validate engine")


def _spoil_norm(model: onnx.ModelProto) -> None:
    """One layer's norm divides by far too much."""
    norm = next(node for node in model.graph.node if node.name.startswith("layers.2/SkipSimplified"))
    for attribute in norm.attribute:
        if attribute.name == "epsilon":
            attribute.f = 50.0


def _swap_rotation(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "RotaryEmbedding")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def _forget_mask(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Attention" and len(node.input) > 3:
            del node.input[3]


@pytest.mark.parametrize(
    ("graph", "change", "failed", "first"),
    [
        ("decoder", _spoil_norm, {"logits", "decode"}, "layers.2"),
        ("decoder", _swap_rotation, {"keys", "q_window"}, "layers.0"),
        ("vision", _forget_mask, {"image_embeds"}, "blocks.0"),
    ],
)
def test_a_wrong_engine_fails_and_its_first_wrong_layer_is_named(
    starkv: Command,
    engines: dict[str, Path],
    tmp_path: Path,
    graph: str,
    change: object,
    failed: set[str],
    first: str,
) -> None:
    broken = wrong(engines["fp32"], tmp_path / "broken", graph, change)
    # The manifest's own hash is gone with the change, and verification with it.
    content = json.loads((broken / "manifest.json").read_text())
    from starkv.manifest import Manifest, seal

    (broken / "manifest.json").write_text(seal(Manifest.model_validate(content)))
    done = starkv(
        *("validate", "engine", broken, "--reference", engines["fp32"], "--prompts", 2, "--layers", "--json")
    )
    assert done.code == 1
    checks = {check["case"]: check for check in json.loads(done.out)["checks"]}
    assert failed & {case for case, check in checks.items() if check["status"] == "failed"}
    named = [case for case, check in checks.items() if "first layer" in check["reason"]]
    assert named == [first]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--against", "torch"), "needs the weights: --checkpoint FOLDER"),
        (("--checkpoint", "somewhere"), "--checkpoint is for --against torch"),
        ((), "would be compared with itself"),
        (("--reference", "nowhere"), "there is no engine at nowhere to compare with"),
    ],
)
def test_what_can_not_be_compared_is_one_line(
    starkv: Command, engines: dict[str, Path], options: tuple[str, ...], reason: str
) -> None:
    done = starkv("validate", "engine", engines["fp32"], *options)
    assert done.code == 2
    assert reason in done.err
    assert not done.out


def test_another_model_is_no_reference(starkv: Command, engines: dict[str, Path], tiny: "object") -> None:
    done = starkv("validate", "engine", engines["fp32"], "--reference", tiny.engine)  # type: ignore[attr-defined]
    assert done.code == 2
    assert "is another model than" in done.err
