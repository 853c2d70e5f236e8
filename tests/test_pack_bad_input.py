# SPDX-License-Identifier: Apache-2.0
"""Packed caches from the command line: bad input is one clear line, and every file stays as it was."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import Command
from packed_engines import PackedEngines
from PIL import Image
from test_bad_input import Refused
from test_kv_packing import copy_with

from starkv.kv_packing.file import PACKING_NAME
from starkv.manifest import MANIFEST_NAME


@pytest.fixture
def refused(starkv: Command, tmp_path: Path) -> Refused:
    return Refused(starkv, tmp_path)


def without_decoder(engine: Path) -> None:
    (engine / "decoder.onnx").unlink()


def with_a_cut_decoder(engine: Path) -> None:
    os.truncate(engine / "decoder.onnx", 100)


def with_other_weights(engine: Path) -> None:
    content = bytearray((engine / "decoder.data").read_bytes())
    content[-1] ^= 0x80
    (engine / "decoder.data").write_bytes(content)


def without_manifest(engine: Path) -> None:
    (engine / MANIFEST_NAME).unlink()


def with_a_changed_manifest(engine: Path) -> None:
    path = engine / MANIFEST_NAME
    path.write_text(path.read_text().replace('"max_context": 512', '"max_context": 511'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_decoder, "decoder.onnx is missing from the engine"),
        (with_a_cut_decoder, "decoder.onnx was changed or damaged"),
        (with_other_weights, "decoder.data was changed or damaged"),
        (without_manifest, f"it has no {MANIFEST_NAME}"),
        (with_a_changed_manifest, "manifest.json was changed since the build"),
    ],
)
def test_damaged_engines(refused: Refused, plain: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(plain)
    assert words in refused("pack", plain, "--kv-quant", "int8")


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
@pytest.mark.parametrize("verb", ["run", "bench", "inspect"])
def test_damaged_packing(
    refused: Refused, packed: PackedEngines, screenshot: Path, tmp_path: Path, verb: str, damage: str
) -> None:
    engine = shutil.copytree(packed.directory("int8"), tmp_path / "packed")
    path = engine / PACKING_NAME
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-40] if damage == "truncated" else content[:-1] + b"\x7f")
    asking = ("--image", screenshot, "--prompt", "x") if verb == "run" else ()
    line = refused(verb, *((engine,) if verb == "inspect" else ("--engine", engine)), *asking)
    words = "is missing from the engine" if damage == "missing" else "was changed or damaged since the build"
    assert f"{PACKING_NAME} {words}" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pack", "{plain}"), "nothing to pack: give --kv-quant int8 or int4, --kv-rank, or both"),
        (("pack", "{plain}", "--kv-quant", "none"), "nothing to pack"),
        (("pack", "{plain}", "--kv-quant", "int3"), "unknown KV quantization 'int3'; known: none, int8"),
        (("pack", "{plain}", "--kv-rank", "0"), "is a share of full rank in (0, 1], such as 0.5, not 0"),
        (("pack", "{plain}", "--kv-rank", "1.5"), "share of full rank in (0, 1], such as 0.5, not 1.5"),
        (("pack", "{plain}", "--kv-rank", "nan"), "share of full rank in (0, 1], such as 0.5, not nan"),
        (("pack", "{plain}", "--kv-rank", "0.01", "--calibration", "{prompts}"), "--kv-rank 0.25 or more"),
        (("pack", "{plain}", "--kv-quant", "int8", "--out", "{plain}"), "is the engine that is to be packed"),
        (("pack", "{plain}", "--kv-quant", "int8", "--out", "photos"), "so it is not overwritten"),
        (("pack", "{plain}", "--kv-quant", "int8", "--out", "photos/a.jpg"), "is no directory"),
        (("pack", "{packed}", "--kv-quant", "int4"), "has a packed cache already"),
        (("pack", "{gpu}", "--kv-quant", "int4"), "is for a GPU; packed caches run in TensorRT"),
        (("pack", "no/such", "--kv-quant", "int8"), "is no engine directory"),
        (("pack", "{plain}", "--kv-quant", "int8", "--calibration", "no"), "no/prompts.jsonl can't be read"),
        (("pack", "{plain}", "--kv-quant", "int8", "--calibration", "few"), "saw 35 tokens of a kind"),
        (("pack", "{plain}", "--factors", "no.factors"), "no.factors holds no low-rank factors"),
        (("pack", "{plain}", "--factors", "photos/a.jpg"), "photos/a.jpg holds no low-rank factors"),
        (("pack", "{plain}", "--factors", "{scales}"), "holds no low-rank factors; `starkv train-kv` writes"),
        (("pack", "{plain}", "--factors", "x", "--kv-rank", "0.5"), "leave --kv-rank and --calibration out"),
        (("pack", "{packed}", "--factors", "x"), "has a packed cache already"),
        (("build", "{model}", "--kv-quant", "int5"), "unknown KV quantization 'int5'"),
        (("build", "{model}", "--kv-rank", "7"), "share of full rank in (0, 1]"),
        (("build", "{model}", "--kv-quant", "int8", "--prepack"), "is not prepacked; leave --prepack"),
        (("build", "{model}", "--kv-quant", "int8", "--device", "cuda"), "leave --prepack and --device"),
        (("build", "{model}", "--kv-rank", "1", "--backend", "trt"), "--kv-rank is about engines of"),
        (("build", "{model}", "--kv-quant", "int8", "--calibration", "no"), "no/prompts.jsonl can't be read"),
        (("build", "{model}", "--quant", "int4", "--calibration", "few"), "--calibration is for --quant"),
        (("run", "{ask}", "--kv-quant", "int3"), "unknown KV quantization 'int3'"),
        (("run", "--engine", "gui-tiny", "--prompt", "x", "--image", "{image}", "--kv-quant", "int8",
          "--device", "cuda"), "on GPUs packed caches run in TensorRT: `starkv build MODEL"),
        (("run", "{ask}", "--kv-rank", "-1"), "share of full rank in (0, 1]"),
        (("run", "{ask}", "--kv-quant", "int8"), "not as int8; make one with `starkv pack`"),
        (("run", "{ask}", "--kv-rank", "0.5"), "does not pack its cache, not as rank 0.5"),
        (("run", "{ask packed}", "--kv-quant", "int4"), "packs its cache as int8, not as int4"),
        (("run", "{ask packed}", "--kv-rank", "0.5", "--kv-quant", "int8"), "as int8, not as rank 0.5 int8"),
        (("run", "{ask packed}", "--kv-quant", "int8", "--kv-method", "snapkv", "--kv-budget", "0.4"),
         "the KV method snapkv keeps other rows for every head, which can't be packed"),
        (("bench", "--engine", "{plain}", "--kv-quant", "int8"), "does not pack its cache, not as int8"),
        (("bench", "--engine", "{packed}", "--kv-quant", "int4"), "packs its cache as int8, not as int4"),
        (("bench", "--engine", "{packed}", "--kv-quant", "int3"), "unknown KV quantization 'int3'"),
        (("eval", "--suite", "synthetic", "--engine", "{plain}", "--kv-quant", "int8", "--n", "1"),
         "does not pack its cache, not as int8"),
    ],
)  # fmt: skip
def test_bad_arguments(
    refused: Refused,
    packed: PackedEngines,
    plain: Path,
    prompts: Path,
    screenshot: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    Path("photos").mkdir()
    Path("photos/a.jpg").write_text("precious")
    Path("few").mkdir()
    Image.fromarray(np.zeros((150, 200, 3), np.uint8)).save("few/a.png")
    Path("few/prompts.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "x", "reply": "y"}))
    ask = ["--image", str(screenshot), "--prompt", "x", "--max-new-tokens", "2"]
    places = {
        "{plain}": [str(plain)],
        "{packed}": [str(packed.directory("int8"))],
        "{model}": [str(packed.folder / "checkpoint")],
        "{prompts}": [str(prompts)],
        "{scales}": [str(packed.directory("int8") / PACKING_NAME)],
        "{image}": [str(screenshot)],
        "{ask}": ["--engine", str(plain), *ask],
        "{ask packed}": ["--engine", str(packed.directory("int8")), *ask],
    }
    if "{gpu}" in arguments:
        places["{gpu}"] = [str(copy_with(packed.plain, tmp_path / "gpu", compute_dtype="bfloat16"))]
    assert words in refused(*(value for name in arguments for value in places.get(name, [name])))


def test_a_full_disk_leaves_nothing(
    refused: Refused, plain: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("starkv.export.build.pack.save_packing", full)
    line = refused("pack", plain, "--kv-quant", "int8", "--calibration", prompts, "--out", "new/place/engine")
    assert "no room for the engine" in line
