# SPDX-License-Identifier: Apache-2.0
"""``starkv pack`` and its kin: engines with packed caches from the command line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import Command
from packed_engines import PackedEngines, calibration_prompts

from starkv.kv_packing.file import PACKING_NAME, load_packing, save_packing
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.manifest import read_manifest

ASK = ("--prompt", "click the red star", "--max-new-tokens", "6")


def asked(starkv: Command, engine: object, screenshot: Path, *options: object) -> dict[str, object]:
    """The object that ``run --json`` prints."""
    outcome = starkv("run", "--engine", engine, "--image", screenshot, *ASK, *options, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, object] = json.loads(outcome.out)
    return found


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--kv-quant", "int4"), "engine-kv-int4"),
        (("--kv-rank", "0.5", "--kv-quant", "int8"), "engine-kv-r50-int8"),
        (("--kv-rank", "1"), "engine-kv-r100"),
    ],
)
def test_an_engine_is_packed_and_runs(
    starkv: Command,
    plain: Path,
    prompts: Path,
    screenshot: Path,
    options: tuple[str, ...],
    name: str,
) -> None:
    outcome = starkv("pack", plain, *options, "--calibration", prompts)
    assert (outcome.code, outcome.out) == (0, f"{name}\n"), outcome.err
    assert sorted(os.listdir()) == ["engine", name]
    manifest = read_manifest(Path(name))
    packing = manifest.kv_packing
    assert packing is not None
    # Nothing is shared with the engine it was made from.
    assert {path.stat().st_nlink for path in Path(name).iterdir()} == {1}

    exact, own = (asked(starkv, folder, screenshot)["timings"] for folder in (plain, name))
    assert isinstance(exact, dict)
    assert isinstance(own, dict)
    assert own["kv_bytes_full"] == exact["kv_bytes_full"] == exact["kv_bytes_kept"]
    assert (own["kv_bytes_kept"] < exact["kv_bytes_kept"]) == (name != "engine-kv-r100")
    if name == "engine-kv-int4":
        assert own["kv_bytes_kept"] == own["kv_tokens_kept"] * packing.bytes_per_row
    named = asked(starkv, name, screenshot, *options)["timings"]
    none = asked(starkv, name, screenshot, "--kv-quant", "none")["timings"]
    assert isinstance(named, dict)
    assert isinstance(none, dict)
    assert named["kv_bytes_kept"] == own["kv_bytes_kept"]
    assert none["kv_bytes_kept"] == exact["kv_bytes_kept"]
    budget = asked(starkv, name, screenshot, "--kv-budget", "0.5")["timings"]
    assert isinstance(budget, dict)
    assert budget["kv_bytes_kept"] < own["kv_bytes_kept"]


def test_factors_of_a_file_take_the_place_of_calibration(
    starkv: Command, packed: PackedEngines, plain: Path
) -> None:
    factors = Path("r50.factors")
    save_packing(packed.packing("rank 0.5"), factors)
    outcome = starkv("pack", plain, "--factors", factors, "--kv-quant", "int8")
    assert (outcome.code, outcome.out) == (0, "engine-kv-trained-int8\n"), outcome.err
    own, calibrated = (
        load_packing(folder / PACKING_NAME)
        for folder in (Path("engine-kv-trained-int8"), packed.directory("rank 0.5 int8"))
    )
    assert isinstance(own, LowRankPacking)
    assert isinstance(calibrated, LowRankPacking)
    assert own.latent == calibrated.latent
    for layer, other in zip(own.layers, calibrated.layers, strict=True):
        for factor, expected in zip((*layer.keys, layer.values), (*other.keys, other.values), strict=True):
            np.testing.assert_allclose(factor.up, expected.up, atol=1e-6)


def test_inspect_tells_of_the_packed_cache(starkv: Command, packed: PackedEngines) -> None:
    engine = packed.directory("rank 0.5 int4")
    packing = read_manifest(engine).kv_packing
    assert packing is not None
    shown = starkv("inspect", engine)
    assert shown.code == 0
    text = " ".join(shown.out.split())
    assert f"rank 0.5 int4: {packing.bytes_per_row} bytes per token" in text
    assert f"{2048 / packing.bytes_per_row:.1f} times fewer" in text
    assert PACKING_NAME in text
    assert "all files have the hashes of the build" in shown.out
    assert "packed cache" not in starkv("inspect", packed.plain).out
    found = json.loads(starkv("inspect", engine, "--json").out)["kv_packing"]
    assert (found["quant"], found["rank"], found["bytes_per_row"]) == ("int4", 0.5, packing.bytes_per_row)


def test_inspect_shows_what_is_kept(starkv: Command, packed: PackedEngines, screenshot: Path) -> None:
    """Rows are chosen by exact keys, so a packed engine keeps those of the plain one."""
    shown = [
        json.loads(starkv("inspect", engine, "--kept", screenshot, "--kv-budget", "0.4", "--json").out)
        for engine in (packed.plain, packed.directory("int8"))
    ]
    assert shown[0].keys() == shown[1].keys()
    for one in shown:
        # What is decoded behind those rows, and what they take, is another matter.
        del one["reply"]
    assert shown[0].pop("bytes")["full"] == shown[1].pop("bytes")["full"]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("variant", ["int8", "rank 0.5 int4"])
def test_bench_measures_packed_rows(
    starkv: Command, packed: PackedEngines, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measured elsewhere, and slow.
    monkeypatch.setattr("starkv.runtime.benchmark.memory_bandwidth", lambda: 1e10)
    engine = packed.directory(variant)
    arguments = ("bench", "--engine", engine, "-p", 60, "-n", 8, "-d", 100, "-r", 1, "--screen", "none")
    info = packed.engine(variant).info
    assert info.kv_packing is not None
    sizes = {}
    for options in ((), ("--kv-budget", "0.5"), ("--kv-quant", "none")):
        outcome = starkv(*arguments, *options, "-o", "json")
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)
        assert found["kv_packing"] == (None if "none" in options else variant)
        for row in found["tests"]:
            sizes[options, row["test"]] = row["kv_mib"] * 2**20
    raw = info.kv_packing.raw_rows or 0
    row, whole = info.kv_packing.bytes_per_row, info.kv_bytes_per_row
    new = 8 * (whole if raw else row)
    assert sizes[(), "tg8 @ d100"] == (100 - raw) * row + raw * whole + new
    assert sizes[("--kv-quant", "none"), "tg8 @ d100"] == 108 * whole
    assert sizes[("--kv-budget", "0.5"), "tg8 @ d100→50"] == (50 - raw) * row + raw * whole + new
    assert sizes[("--kv-budget", "0.5"), "kv160→80"] == pytest.approx((80 - raw) * row + raw * whole, rel=0.2)
    table = starkv(*arguments).out
    assert f"| {variant} |" in table
    shown = starkv(*arguments, "--kv-method", "snapkv", "--kv-budget", "0.5")
    assert "| float32 snapkv |" in shown.out


def test_build_packs_in_one_step(
    starkv: Command, packed: PackedEngines, prompts: Path, screenshot: Path
) -> None:
    checkpoint = packed.folder / "checkpoint"
    options = ("--kv-quant", "int8", "--calibration", prompts)
    built = starkv("build", checkpoint, "--quant", "int4", *options)
    assert (built.code, built.out) == (0, "engines/checkpoint-ort-int4-kv-int8\n"), built.err
    assert os.listdir("engines") == ["checkpoint-ort-int4-kv-int8"]
    assert {path.stat().st_nlink for path in Path(built.out.strip()).iterdir()} == {1}
    timings = asked(starkv, built.out.strip(), screenshot)["timings"]
    assert isinstance(timings, dict)
    assert timings["kv_bytes_kept"] < timings["kv_bytes_full"] / 3
    # An export is built the same way.
    again = starkv("build", packed.folder / "export", *options, "--out", "other/engine")
    assert (again.code, again.out) == (0, "other/engine\n"), again.err
    assert read_manifest(Path("other/engine")).kv_packing is not None
    assert os.listdir("other") == ["engine"]


def test_a_build_whose_packing_fails_keeps_its_export(
    starkv: Command, packed: PackedEngines, prompts: Path, tmp_path: Path
) -> None:
    """As any build that is interrupted: the next one goes on from it."""
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(prompts / "0.png", few)
    (few / "prompts.jsonl").write_text((prompts / "prompts.jsonl").read_text().splitlines()[0])
    arguments = ("build", packed.folder / "checkpoint", "--kv-quant", "int8", "--out", "place/engine")
    failed = starkv(*arguments, "--calibration", few)
    assert (failed.code, failed.out) == (2, "")
    assert "calibration saw 35 tokens of a kind" in failed.err
    assert os.listdir("place") == [".engine.export"]
    again = starkv(*arguments, "--calibration", prompts)
    assert again.code == 0, again.err
    assert "going on with an earlier run" in again.err
    assert os.listdir("place") == ["engine"]


def test_models_are_packed_once_and_found_again(
    starkv: Command,
    packed: PackedEngines,
    prompts: Path,
    screenshot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from starkv.calibration import kv_prompts
    from starkv.export import cards

    card = cards.card_of_folder(packed.folder / "checkpoint")
    card = card.model_copy(update={"name": "biased", "folder": str(packed.folder / "checkpoint")})
    monkeypatch.setattr(cards, "card_names", lambda: ["biased"])
    monkeypatch.setattr("starkv.export.cards.load_card", lambda name: card)
    monkeypatch.setattr(kv_prompts, "kv_prompts", lambda *_: calibration_prompts())
    monkeypatch.setenv("STARKV_ENGINES", str(tmp_path / "home"))
    arguments = ("run", "--engine", "biased", "--image", screenshot, *ASK, "--kv-quant", "int8")
    first, second = starkv(*arguments), starkv(*arguments)
    assert first.code == 0, first.err
    assert first.out == second.out != ""
    assert "packing" in first.err
    assert "packing" not in second.err
    preset = card.quantization
    assert sorted(os.listdir(tmp_path / "home")) == [
        f"biased-ort-{preset}",
        f"biased-ort-{preset}-kv-int8",
    ]


def test_an_engine_in_the_place_is_replaced(
    starkv: Command, plain: Path, prompts: Path, packed: PackedEngines
) -> None:
    shutil.copytree(packed.directory("int4"), "out")
    outcome = starkv("pack", plain, "--kv-quant", "int8", "--calibration", prompts, "--out", "out")
    assert outcome.code == 0, outcome.err
    found = read_manifest(Path("out")).kv_packing
    assert found is not None
    assert found.describe() == "int8"
    assert sorted(os.listdir()) == ["engine", "out"]
