# SPDX-License-Identifier: Apache-2.0
"""``starkv export --random-weights``: from sizes alone to an engine that answers."""

import json
import os
from pathlib import Path

import pytest
from command import Command
from random_configs import opencua_config, qwen2_vl_config, small_config

from starkv.export import cards
from starkv.export.record import read_record
from starkv.manifest import read_manifest

RANDOM = ("--random-weights", "--quant", "int4")


def sizes(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", [small_config(), qwen2_vl_config(), opencua_config()])
def test_a_config_alone_becomes_an_engine_that_answers(
    starkv: Command, screenshot: Path, config: dict[str, object]
) -> None:
    sizes(Path("model"), config)
    exported = starkv("export", "./model", "--out", "export", *RANDOM)
    assert (exported.code, exported.out) == (0, "export\n"), exported.err
    assert sorted(os.listdir()) == ["export", "model"]
    record = read_record(Path("export"))
    assert record.name == "model-random"
    assert record.licence == "none: the weights are random"
    built = starkv("build", "export", "--out", "engine")
    assert built.code == 0, built.err
    ran = starkv(
        "run",
        "--engine",
        "engine",
        "--image",
        screenshot,
        "--prompt",
        "Click.",
        "--max-new-tokens",
        8,
        "--json",
    )
    reply = json.loads(ran.out)
    assert reply["timings"]["generated_tokens"] == 8
    assert reply["text"]


def test_a_card_is_exported_at_its_own_sizes_and_kept_apart(
    starkv: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = cards.load_card("ui-tars-1.5-7b")
    monkeypatch.setattr(
        cards, "config_of_card", lambda card: sizes(tmp_path / "sizes", small_config()) / "config.json"
    )
    done = starkv(
        "export", "ui-tars-1.5-7b", *RANDOM, "--layers", 1, "--random-dtype", "fp16", "--checkpoint", "kept"
    )
    assert (done.code, done.out) == (0, "exports/ui-tars-1.5-7b-random-int4\n"), done.err
    record = read_record(Path(done.out.strip()))
    assert record.text.layers == 1
    assert (record.prompt, record.kv_budget, record.coordinates) == (
        card.prompt,
        card.kv_budget,
        card.coordinates,
    )
    assert record.image.max_pixels == card.max_pixels
    assert record.quantization.embedding == "fp16"
    assert record.source == "random weights, seed 0"
    assert (Path("kept") / "model.safetensors").is_file()


def test_a_kept_checkpoint_is_used_again(starkv: Command) -> None:
    sizes(Path("model"), small_config())
    arguments = ("export", "./model", "--out", "export", *RANDOM, "--checkpoint", "kept")
    assert starkv(*arguments).code == 0
    before = (Path("kept") / "model.safetensors").stat()
    assert starkv(*arguments).code == 0
    after = (Path("kept") / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("model/", "--layers", 1), "add --random-weights"),
        (("model/", "--random-dtype", "bf16"), "add --random-weights"),
        (("model/", *RANDOM, "--random-dtype", "int8"), "unknown dtype 'int8'"),
        (("model/", *RANDOM, "--layers", 9), "the model has 3 layers"),
        (("model/", *RANDOM, "--checkpoint", "model"), "not overwritten"),
        (("empty/", *RANDOM), "random weights need the sizes"),
        (("ui-tars-1.5", *RANDOM), "did you mean 'ui-tars-1.5-7b'"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(
    starkv: Command, arguments: tuple[object, ...], error: str
) -> None:
    sizes(Path("model"), small_config())
    Path("empty").mkdir()
    done = starkv("export", *arguments, "--out", "deep/export")
    assert done.code == 2
    assert error in done.err
    assert sorted(os.listdir()) == ["empty", "model"]


@pytest.mark.parametrize("command", ["export", "build"])
def test_research_licences_are_pointed_out(
    starkv: Command, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cards.CARDS_DIRECTORY / "gui-tiny"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "qwen2.5-vl-3b").symlink_to(source)
    monkeypatch.setenv("STARKV_MODELS", str(tmp_path / "home"))
    done = starkv(command, "qwen2.5-vl-3b", "--out", "out")
    assert done.code == 0, done.err
    assert "licence of the weights is Qwen Research License (https://huggingface.co/Qwen/" in done.err
    assert "warning: the licence of qwen2.5-vl-3b allows research only" in done.err
    description = read_record(Path("out")) if command == "export" else read_manifest(Path("out"))
    assert description.source == "Qwen/Qwen2.5-VL-3B-Instruct"
