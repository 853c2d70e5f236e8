# SPDX-License-Identifier: Apache-2.0
"""``starkv inspect --kept``: numbers that agree with the cache, every kind of picture, what is refused."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command import Command
from conftest import ChatModel
from PIL import Image
from test_bad_input import Refused
from test_without_torch import run_without

KEPT = ("--prompt", "click the red star", "--kv-budget", 0.5)


@pytest.fixture
def refused(starkv: Command, tmp_path: Path) -> Refused:
    return Refused(starkv, tmp_path)


def test_picture_and_table(starkv: Command, reciting: ChatModel, screenshot: Path) -> None:
    shown = starkv("inspect", reciting.engine, "--kept", screenshot, *KEPT)
    assert shown.code == 0
    assert "screenshot 1" in shown.out
    assert "STaR-KV, native, budget 0.5" in shown.out
    assert shown.err == "drawn to kept.png\n"
    assert os.listdir() == ["kept.png"]
    with Image.open("kept.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 20


@pytest.mark.parametrize("method", ["star_kv", "snapkv", "streaming_llm", "random", "full"])
def test_numbers_agree_with_the_cache(
    starkv: Command, babbling: ChatModel, screenshot: Path, method: str
) -> None:
    """What is counted on the masks is what the pool holds."""
    Image.new("RGB", (120, 90), (250, 250, 250)).save("old.png")
    budget = () if method == "full" else ("--kv-budget", 0.4)
    asking = ("--kept", "old.png", "--kept", screenshot, "--kv-method", method, *budget)
    shown = starkv("inspect", babbling.engine, *asking, "--json", "--max-new-tokens", 1)
    assert (shown.code, shown.err) == (0, "")
    assert os.listdir() == ["old.png"], "with --json a picture is drawn only where one is asked for"
    numbers = json.loads(shown.out)
    assert numbers["method"] == method
    assert np.mean(numbers["rows_per_layer"]) == pytest.approx(numbers["rows"]["kept"])
    share = numbers["bytes"]["kept"] / numbers["bytes"]["full"]
    assert share == pytest.approx(numbers["rows"]["kept"] / numbers["rows"]["full"])
    assert [shot["grid"] for shot in numbers["screenshots"]] == [[3, 4], [5, 7]]
    parts = [*numbers["screenshots"], numbers["text"]]
    assert sum(part["tokens"] for part in parts) == numbers["rows"]["full"]
    kept = np.sum([part["kept_per_layer"] for part in parts], axis=0)
    assert kept == pytest.approx(numbers["rows_per_layer"])
    assert all(
        np.sum(shot["kept_in_layers"]) == pytest.approx(np.sum(shot["kept_per_layer"]))
        for shot in numbers["screenshots"]
    )
    assert set(numbers["stages"]) == (
        {"hidden_norm_boost", "spatial_prior", "temporal_discount"} if method == "star_kv" else set()
    )


def test_a_fifth_is_kept_by_default(starkv: Command, reciting: ChatModel, screenshot: Path) -> None:
    shown = json.loads(starkv("inspect", reciting.engine, "--kept", screenshot, "--json").out)
    assert shown["budget"] == {"ratio": 0.2, "capacity": None}
    assert shown["actions"][0]["model_xy"] == [56, 28]


def test_replay_lets_the_memory_of_the_trajectory_act(
    starkv: Command, babbling: ChatModel, tmp_path: Path
) -> None:
    """STaR-KV compares a screenshot with earlier ones of the same size: the third is the first to be."""
    asking: list[object] = ["inspect", babbling.engine, "--json", "--max-new-tokens", 1]
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
        asking += ["--kept", tmp_path / f"{seed}.png"]
    once, replayed = (json.loads(starkv(*asking, *more).out) for more in ((), ("--replay",)))
    assert not once["stages"]["temporal_discount"]["acted"]
    assert replayed["stages"]["temporal_discount"]["acted"]


@pytest.mark.parametrize(
    "options",
    [
        ("--layer", 1),
        ("--kv-mode", "official"),
        ("--kv-method", "gui_kv", "--head", 1, "--layer", 0),
        ("--kv-method", "pyramidkv"),
        ("--kv-method", "streaming_llm", "--layer", 0),
        ("--kv-method", "random", "--kv-capacity", 12),
        ("--kv-method", "full"),
        ("--kv-capacity", 4096),
    ],
)
def test_every_kind_of_picture_is_drawn(
    starkv: Command, babbling: ChatModel, screenshot: Path, options: tuple[object, ...]
) -> None:
    Image.new("RGB", (300, 80), (20, 20, 30)).save("dark.png")
    asking = ("--kept", screenshot, "--kept", "dark.png", "--prompt", "$x_1$ 点 <b>", "--max-new-tokens", 1)
    shown = starkv("inspect", babbling.engine, *asking, "--out", "seen.png", *options)
    assert (shown.code, shown.err) == (0, "drawn to seen.png\n")
    assert sorted(os.listdir()) == ["dark.png", "seen.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kept", "nowhere.png"), "nowhere.png does not exist"),
        (("--kept", "{image}", "--kv-budget", 0), "share of the prompt in (0, 1], such as 0.2, not 0"),
        (("--kept", "{image}", "--kv-capacity", 1), "at least 2 rows"),
        (("--kept", "{image}", "--layer", 2), "no layer 2; this model has layers 0 to 1"),
        (("--kept", "{image}", "--head", 2), "no KV head 2; this model has KV heads 0 to 1"),
        (("--kept", "{image}", "--head", 0), "star_kv keeps the same rows for all heads"),
        (("--kept", "{image}", "--kv-method", "magic"), "unknown KV method 'magic'"),
        (("--kept", "{image}", "--kv-mode", "magic"), "unknown STaR-KV mode 'magic'"),
        (("--kept", "{image}", "--out", "nowhere/kept.png"), "the folder nowhere does not exist"),
        (("--kept", "{image}", "--out", "."), "it is a folder"),
        (("--kept", "{image}", "--prompt", "star " * 600), "was built for 512"),
        (("--layer", 0), "add --kept SCREENSHOT"),
        (("--kv-mode", "official"), "add --kept SCREENSHOT"),
        (("--out", "kept.png"), "add --kept SCREENSHOT"),
    ],
)  # fmt: skip
def test_bad_options(
    refused: Refused, reciting: ChatModel, screenshot: Path, options: tuple[object, ...], words: str
) -> None:
    line = refused(
        "inspect", reciting.engine, *(screenshot if value == "{image}" else value for value in options)
    )
    assert words in line


def test_a_missing_engine(refused: Refused, screenshot: Path) -> None:
    assert "no/such does not exist" in refused("inspect", "no/such", "--kept", screenshot)


def test_a_failure_leaves_the_old_picture(
    starkv: Command, reciting: ChatModel, screenshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    Path("kept.png").write_text("precious")
    monkeypatch.setattr(Image.Image, "save", broken)
    shown = starkv("inspect", reciting.engine, "--kept", screenshot)
    assert (shown.code, shown.out) == (2, "")
    assert "can't write the picture kept.png: No space left on device" in shown.err
    assert os.listdir() == ["kept.png"]
    assert Path("kept.png").read_text() == "precious"


def test_numbers_need_no_matplotlib(reciting: ChatModel, screenshot: Path, tmp_path: Path) -> None:
    def inspect(*options: str) -> subprocess.CompletedProcess[str]:
        asking = ("inspect", reciting.engine, "--kept", screenshot, *options)
        return run_without("matplotlib", "starkv.cli", *asking, cwd=tmp_path)

    assert json.loads(inspect("--json").stdout)["method"] == "star_kv"
    drawn = inspect()
    assert (drawn.returncode, drawn.stdout) == (2, "")
    assert drawn.stderr == "error: this needs the package matplotlib; pip install 'starkv[eval]'\n"
    assert list(tmp_path.iterdir()) == []
