# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with the input: one clear line on stderr, exit code 2, and every file as it was."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Command
from conftest import ChatModel
from PIL import Image
from safetensors.torch import load_file, save_file

from starkv.manifest import MANIFEST_NAME


def listing(root: Path) -> dict[str, int]:
    """Every path under ``root`` with the size of its file."""
    return {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*"))}


class Refused:
    """Runs the command and demands that it refuses properly."""

    def __init__(self, command: Command, root: Path) -> None:
        self.command, self.root = command, root

    def __call__(self, *arguments: object) -> str:
        before = listing(self.root)
        outcome = self.command(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        # Notes may come first; the error is the last line, and one line.
        *notes, line = outcome.err.splitlines()
        assert line.startswith("error: ")
        assert not any("error" in note or "Traceback" in note for note in notes)
        assert listing(self.root) == before
        return line


@pytest.fixture
def refused(starkv: Command, tmp_path: Path) -> Refused:
    return Refused(starkv, tmp_path)


@pytest.fixture
def checkpoint(reciting: ChatModel, tmp_path: Path) -> Path:
    return shutil.copytree(reciting.checkpoint, tmp_path / "broken")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split_into_shards(folder: Path) -> list[Path]:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {}
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in part}, shard)
        index.update(dict.fromkeys(part, shard.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()
    return shards


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def missing_shard(folder: Path) -> None:
    split_into_shards(folder)[1].unlink()


def truncated_shard(folder: Path) -> None:
    shard = split_into_shards(folder)[1]
    os.truncate(shard, shard.stat().st_size - 100)


def truncated_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def missing_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")


def wrong_architecture(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaForCausalLM"])


def quantized_unread(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def no_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["visual.blocks.0.attn.proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors")


def other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def no_limits(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def wrong_limits(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{}")


@pytest.mark.parametrize("verb", ["export", "build"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_weights, ["neither model.safetensors nor", "download"]),
        (missing_shard, ["model-00002-of-00002.safetensors is missing", "download"]),
        (truncated_shard, ["model-00002-of-00002.safetensors is truncated"]),
        (truncated_header, ["model.safetensors is truncated inside its header"]),
        (empty_weights, ["model.safetensors is no safetensors file"]),
        (missing_tensor, ["1 of 69 tensors are missing, the first is lm_head.weight", "download"]),
        (no_number, ["tensor model.visual.blocks.0.attn.proj.weight holds values that are not finite"]),
        (other_sizes, ["0.mlp.gate_proj.weight has shape [384, 256], but", "ask for [768, 256]"]),
        (wrong_architecture, ["LlamaForCausalLM is not supported", "Qwen2_5_VLForConditionalGeneration"]),
        (quantized_unread, ["config.json", "bitsandbytes", "GPTQ (4 or 8 bits)"]),
        (damaged_config, ["config.json is not readable JSON"]),
        (no_template, ["has no chat template"]),
        (no_limits, ["preprocessor_config.json is missing"]),
        (wrong_limits, ["preprocessor_config.json: no usable pixel limits"]),
    ],
)
def test_damaged_checkpoint(
    refused: Refused, checkpoint: Path, verb: str, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(checkpoint)
    line = refused(verb, checkpoint)
    for word in words:
        assert word in line


def write_bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


def write_zero_size(path: Path) -> None:
    content = bytearray(b"P6\n0 0\n255\n")
    path.write_bytes(content)


def write_truncated(path: Path) -> None:
    Image.effect_noise((100, 100), 50).save(path, "PNG")
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
        (lambda path: path.write_text("no image at all"), "is not an image"),
        (write_zero_size, "screen.png"),
        (write_bomb, "too large"),
        (lambda path: Image.new("RGB", (20_000, 100)).save(path), "is too large: 20000x100 pixels"),
        (lambda path: Image.new("RGB", (900, 3)).save(path), "too narrow"),
        (write_truncated, "is damaged"),
        (lambda path: path.mkdir(), "can't be read"),
        (lambda path: None, "does not exist"),
    ],
)
def test_bad_image(
    refused: Refused, reciting: ChatModel, tmp_path: Path, write: Callable[[Path], object], words: str
) -> None:
    image = tmp_path / "screen.png"
    write(image)
    line = refused("run", "--engine", reciting.engine, "--image", image, "--prompt", "x", "--draw", "d.png")
    assert words in line


@pytest.mark.parametrize("verb", ["run", "bench", "inspect"])
def test_engine_with_a_changed_byte(
    refused: Refused, reciting: ChatModel, screenshot: Path, tmp_path: Path, verb: str
) -> None:
    engine = shutil.copytree(reciting.engine, tmp_path / "engine")
    content = bytearray((engine / "decoder.data").read_bytes())
    content[-1] ^= 0x80
    (engine / "decoder.data").write_bytes(content)
    asking = ("--image", screenshot, "--prompt", "x") if verb == "run" else ()
    chosen = (engine,) if verb == "inspect" else ("--engine", engine)
    line = refused(verb, *chosen, *asking)
    assert "decoder.data was changed or damaged" in line
    (engine / MANIFEST_NAME).unlink()
    assert f"it has no {MANIFEST_NAME}" in refused(verb, *chosen, *asking)


@pytest.mark.parametrize(
    ("name", "hint"), [("gui-tini", "did you mean 'gui-tiny'?"), ("@@@", "known: gui-tiny")]
)
@pytest.mark.parametrize("verb", ["export", "build", "bench", "run"])
def test_unknown_model(refused: Refused, screenshot: Path, verb: str, name: str, hint: str) -> None:
    chosen = (name,) if verb in ("export", "build") else ("--engine", name)
    asking = ("--image", screenshot, "--prompt", "x") if verb == "run" else ()
    line = refused(verb, *chosen, *asking)
    assert f"unknown model '{name}'" in line
    assert hint in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "{model}", "--quant", "int3"), "unknown quantization 'int3'; known: fp32, int8, int4"),
        (("build", "{model}", "--quant", "int3"), "unknown quantization 'int3'"),
        (("export", "{model}", "--route", "magic"), "unknown route 'magic'; known: build, trace"),
        (("export", "{model}", "--route", "trace", "--quant", "int8"), "trace route exports fp32 only"),
        (("build", "{model}", "--backend", "tpu"), "unknown backend 'tpu'; known: auto, ort, trt"),
        (("build", "{model}", "--backend", "trt", "--prepack"), "--prepack is about engines of"),
        (("build", "{export}", "--quant", "int4"), "was exported as fp32, not int4"),
        (("export", "no/such/folder"), "checkpoint folder no/such/folder does not exist"),
        (("run", "--engine", "no/such", "--prompt", "x", "--image", "{image}"), "is no engine directory"),
        (("run", "{asking}", "--kv-method", "magic"), "unknown KV method 'magic'; known: full, star_kv"),
        (("run", "{asking}", "--prompt", "star " * 600), "KV rows, but tiny was built for 512"),
        (("run", "{asking}", "--max-new-tokens", "600"), "was built for 512"),
        (("run", "{asking}", "--prompt", "<|image_pad|>"), "2 image placeholders for 1 images"),
        (("run", "{asking}", "--top-p", "0"), "top_p must lie in (0, 1]"),
        (("run", "{asking}", "--seed", "-1"), "seed must be at least 0"),
        (("run", "{asking}", "--stop", ""), "stop string must not be empty"),
        (("run", "{asking}", "--draw", "nowhere/click.png"), "the folder nowhere does not exist"),
        (("run", "{asking}", "--draw", "."), "it is a folder"),
        (("build", "{export}", "--random-weights"), "is exported already; --checkpoint, --random-weights"),
        (("build", "{model}", "--layers", "1"), "are about random weights; add --random-weights"),
        (("bench", "--engine", "{engine}", "-o", "xml"), "unknown output 'xml'; known: md, json, csv"),
        (("bench", "--engine", "{engine}", "--screen", "0x5"), "is not WIDTHxHEIGHT"),
        (("bench", "--engine", "{engine}", "--screen", "99999x99999"), "more than 67,108,864 pixels"),
        (("bench", "--engine", "{engine}", "-p", "400", "-d", "200"), "600 KV rows are needed"),
    ],
)  # fmt: skip
def test_bad_argument(
    refused: Refused, reciting: ChatModel, screenshot: Path, arguments: tuple[str, ...], words: str
) -> None:
    """``{asking}`` stands for a run that is right but for what follows it."""
    asking = ["--engine", str(reciting.engine), "--image", str(screenshot), "--prompt", "x"]
    places = {
        "{model}": [str(reciting.checkpoint)],
        "{export}": [str(reciting.checkpoint.parent / "export")],
        "{engine}": [str(reciting.engine)],
        "{image}": [str(screenshot)],
        "{asking}": asking,
    }
    assert words in refused(*(value for name in arguments for value in places.get(name, [name])))


@pytest.mark.parametrize("verb", ["export", "build"])
def test_out_that_holds_something_else(
    refused: Refused, reciting: ChatModel, tmp_path: Path, verb: str
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_text("precious")
    assert "so it is not overwritten" in refused(verb, reciting.checkpoint, "--out", photos)
    inside = photos / "holiday.jpg"
    assert "is no directory" in refused(verb, reciting.checkpoint, "--out", inside)
    assert "holiday.jpg is no directory" in refused(verb, reciting.checkpoint, "--out", inside / "deeper")
    assert inside.read_text() == "precious"


def test_a_full_disk_leaves_no_engine_and_the_next_run_goes_on(
    starkv: Command, reciting: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ("build", reciting.checkpoint, "--out", "new/engines/one")
    with monkeypatch.context() as patch:
        patch.setattr("starkv.export.build.ort.write_manifest", full)
        outcome = starkv(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "disk" in outcome.err.splitlines()[-1]
    assert "full" in outcome.err.splitlines()[-1]
    assert [path.name for path in Path("new/engines").iterdir()] == [".one.export"]

    again = starkv(*arguments)
    assert again.code == 0
    assert "going on with an earlier run" in again.err
    assert [path.name for path in Path("new/engines").iterdir()] == ["one"]


def test_a_path_is_printed_as_it_is(refused: Refused) -> None:
    """Brackets and colons mean something to the library that prints."""
    name = "odd/[bold]:cat:\\[/]"
    assert f"checkpoint folder {name} does not exist" in refused("export", name)
