# SPDX-License-Identifier: Apache-2.0
"""``starkv validate engine`` on engines of ONNX Runtime: right ones pass, wrong ones do not."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from command import Command
from conftest import TinyModel

from starkv.export.build.ort import build_ort_engine
from starkv.export.cards import load_card
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import load_preset
from starkv.manifest import MANIFEST_NAME, read_manifest, seal

Change = Callable[[onnx.ModelProto], None]
MODEL = Path(__file__).resolve().parent.parent / "models" / "gui-tiny"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("engines"), {}
    for preset in ("fp32", "int4"):
        export_model(MODEL, load_card("gui-tiny"), root / f"{preset}-export", load_preset(preset))
        build_ort_engine(root / f"{preset}-export", root / preset)
        found[preset] = root / preset
    return found


def wrong(engine: Path, folder: Path, graph: str, change: Change) -> Path:
    """A copy of an engine with one graph changed, and a manifest that knows no hashes."""
    shutil.copytree(engine, folder)
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    change(model)
    onnx.save(model, folder / f"{graph}.onnx")
    manifest = read_manifest(folder).model_copy(update={"files": {}, "manifest_sha256": ""})
    (folder / MANIFEST_NAME).write_text(seal(manifest))
    return folder


def checks_of(output: str) -> dict[str, dict[str, Any]]:
    return {check["case"]: check for check in json.loads(output)["checks"]}


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
    # Rows of nearly the same score at the cut may change places where sums are made in another order.
    assert cases["kept_rows"]["measures"]["kept_agreement"] >= 0.999
    assert max(check["measures"].get("error", 0) for check in report["checks"]) < 1e-3


def test_quantized_weights_are_held_to_logits_only(
    starkv: Command, engines: dict[str, Path], tmp_path: Path
) -> None:
    table = tmp_path / "new" / "report.md"
    done = starkv(
        *("validate", "engine", engines["int4"], "--reference", engines["fp32"], "--prompts", 1, "--layers"),
        *("--out", table, "--json"),
    )
    assert done.code == 0, done.out + done.err
    checks = checks_of(done.out)
    assert {case for case, check in checks.items() if check["status"] == "passed"} == {
        *("image_embeds", "logits", "kept_rows", "tokens")
    }
    assert {"keys", "decode", "blocks.0", "layers.0", "layers.3"} <= checks.keys()
    assert checks["keys"]["reason"] == "the weights were rounded differently"
    assert checks["layers.0"]["measures"]["total_error"] < checks["layers.3"]["measures"]["total_error"]
    lines = table.read_text().splitlines()
    assert lines[0].startswith("# validate engine")
    assert sum(line.startswith("| skipped | layers.") for line in lines) == 6


def test_outputs_are_kept_for_polygraphy(starkv: Command, engines: dict[str, Path], tmp_path: Path) -> None:
    from polygraphy.comparator import RunResults

    saved = tmp_path / "new" / "outputs.json"
    copy = tmp_path / "copy"
    shutil.copytree(engines["fp32"], copy)
    done = starkv(
        *("validate", "engine", copy, "--reference", engines["fp32"], "--prompts", 2),
        *("--save-polygraphy", saved),
    )
    assert done.code == 0, done.out + done.err
    assert "0 failed" in done.err
    results = RunResults.load(str(saved))
    assert {name: len(iterations) for name, iterations in results} == {"ONNX Runtime": 2, "engine": 2}
    first = results["engine"][0]
    assert {"image_embeds", "logits", "keys.3", "decode.0", "decode_kept.0", "tokens"} <= first.keys()


def test_nothing_stays_beside_an_engine(starkv: Command, engines: dict[str, Path]) -> None:
    place = engines["int4"].parent
    before = sorted(place.iterdir())
    done = starkv(
        *("validate", "engine", engines["int4"], "--reference", engines["fp32"], "--prompts", 1, "--layers")
    )
    assert done.code == 0
    assert sorted(place.iterdir()) == before


def test_polygraphy_is_asked_for(
    starkv: Command, engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    done = starkv("validate", "engine", engines["int4"], "--reference", engines["fp32"], "--prompts", 1)
    assert done.code == 2
    assert "comparing engines needs the package polygraphy; `pip install polygraphy`" in done.err


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


def _scale_queries(model: onnx.ModelProto) -> None:
    """The scores of one layer are a twentieth too large."""
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][3]
    cache = next(each for each in model.graph.input if each.name == "past_k.3")
    head_dim = cache.type.tensor_type.shape.dim[-1].dim_value
    attention.attribute.append(onnx.helper.make_attribute("scale", 1.05 * head_dim**-0.5))


@pytest.mark.parametrize(
    ("graph", "change", "failed", "first"),
    [
        ("decoder", _spoil_norm, {"logits", "decode", "keys", "values"}, "layers.2"),
        ("decoder", _scale_queries, {"logits"}, "layers.3"),
        ("decoder", _swap_rotation, {"logits", "keys", "q_window", "kept_rows", "tokens"}, "layers.0"),
        # What the whole tower puts out can hide that within its bounds.
        ("vision", _forget_mask, {"blocks.0", "blocks.1"}, "blocks.0"),
    ],
)
def test_a_wrong_engine_fails_and_its_first_wrong_layer_is_named(
    starkv: Command,
    engines: dict[str, Path],
    tmp_path: Path,
    graph: str,
    change: Change,
    failed: set[str],
    first: str,
) -> None:
    broken = wrong(engines["fp32"], tmp_path / "broken", graph, change)
    done = starkv(
        *("validate", "engine", broken, "--reference", engines["fp32"], "--prompts", 2, "--layers", "--json")
    )
    assert done.code == 1
    checks = checks_of(done.out)
    assert failed <= {case for case, check in checks.items() if check["status"] == "failed"}
    named = [case for case, check in checks.items() if "the first layer of" in check["reason"]]
    assert named == [first]


def test_a_wrong_decoder_is_found_against_pytorch(
    starkv: Command, engines: dict[str, Path], tmp_path: Path
) -> None:
    broken = wrong(engines["fp32"], tmp_path / "broken", "decoder", _scale_queries)
    done = starkv(
        *("validate", "engine", broken, "--against", "torch", "--checkpoint", MODEL, "--prompts", 1, "--json")
    )
    assert done.code == 1
    checks = checks_of(done.out)
    assert checks["logits"]["status"] == "failed"
    assert checks["logits"]["reference"] == "PyTorch"
    assert checks["image_embeds"]["status"] == "passed"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--against", "torch"), "needs the weights: --checkpoint FOLDER"),
        (("--checkpoint", "somewhere"), "--checkpoint is for --against torch"),
        (("--against", "torch", "--checkpoint", MODEL, "--layers"), "leave --against torch out"),
        ((), "would be compared with itself"),
        (("--reference", "nowhere"), "there is no engine at nowhere to compare with"),
    ],
)
def test_what_can_not_be_compared_is_one_line(
    starkv: Command, engines: dict[str, Path], options: tuple[object, ...], reason: str
) -> None:
    done = starkv("validate", "engine", engines["fp32"], *options)
    assert done.code == 2
    assert reason in done.err
    assert not done.out


def test_another_model_is_no_reference(starkv: Command, engines: dict[str, Path], tiny: TinyModel) -> None:
    done = starkv("validate", "engine", engines["fp32"], "--reference", tiny.engine)
    assert done.code == 2
    assert "is another model than" in done.err
