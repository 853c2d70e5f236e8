# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test files share."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from workers import take_own_core

# Before anything counts the cores.
take_own_core()

if TYPE_CHECKING:
    from collections.abc import Iterator

    from command import Command
    from fake_engine import FakeEngine
    from packed_engines import PackedEngines
    from served import Server
    from transformers import Qwen2_5_VLForConditionalGeneration

    from starkv.runtime.preprocess.tokenizer import ChatTokenizer


PLAIN_PRESETS = ("fp32", "int8", "int4", "int4-small")
"""Quantizations that need no calibration prompts."""


@dataclass(frozen=True)
class TinyModel:
    """A small random Qwen2.5-VL: PyTorch model, checkpoint, its exports and ONNX Runtime engine."""

    model: "Qwen2_5_VLForConditionalGeneration"
    checkpoint: Path
    exports: dict[str, Path]
    """Preset → export directory."""
    engine: Path
    """Engine of the fp32 export."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Make the tiny model once; tests must not change its files or weights."""
    from tiny_model import make_tiny_model, tiny_card

    from starkv.export.build.ort import build_ort_engine
    from starkv.export.export_model import export_model
    from starkv.export.quantize.presets import PRESETS

    root = tmp_path_factory.mktemp("tiny")
    model = make_tiny_model(root / "checkpoint")
    exports = {name: root / name for name in PLAIN_PRESETS}
    for name, out in exports.items():
        export_model(root / "checkpoint", tiny_card(), out, PRESETS[name])
    build_ort_engine(exports["fp32"], root / "engine")
    return TinyModel(model, root / "checkpoint", exports, root / "engine")


@dataclass(frozen=True)
class ChatModel:
    """A model that can be talked to, as a checkpoint and as an fp32 engine."""

    checkpoint: Path
    engine: Path


def _chat_model(checkpoint: Path) -> ChatModel:
    from tiny_model import tiny_card

    from starkv.export.build.ort import build_ort_engine
    from starkv.export.export_model import export_model
    from starkv.export.quantize.presets import PRESETS

    root = checkpoint.parent
    export_model(checkpoint, tiny_card(), root / "export", PRESETS["fp32"])
    build_ort_engine(root / "export", root / "engine")
    return ChatModel(checkpoint, root / "engine")


@pytest.fixture(scope="session")
def babbling(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """The weights of ``tiny`` with a tokenizer: says anything, but all of it depends on what it sees."""
    from tiny_chat import write_chat_files

    checkpoint = tmp_path_factory.mktemp("babbling") / "checkpoint"
    shutil.copytree(tiny.checkpoint, checkpoint)
    write_chat_files(checkpoint)
    return _chat_model(checkpoint)


@pytest.fixture(scope="session")
def reciting(babbling: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """Answers everything with the same click."""
    from tiny_chat import make_reciting_checkpoint

    checkpoint = tmp_path_factory.mktemp("reciting") / "checkpoint"
    make_reciting_checkpoint(babbling.checkpoint, checkpoint)
    return _chat_model(checkpoint)


@pytest.fixture(scope="session")
def packed(babbling: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> "PackedEngines":
    """``babbling`` with large key biases, and engines of it whose caches are packed."""
    from packed_engines import PackedEngines, with_big_biases

    root = tmp_path_factory.mktemp("packed")
    model = _chat_model(with_big_biases(babbling.checkpoint, root / "checkpoint"))
    return PackedEngines(model.engine, root)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prompts that a packed cache can be calibrated on."""
    from packed_engines import write_prompts

    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="session")
def gui_tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 engine of the embedded model."""
    from starkv.export.build.ort import build_ort_engine
    from starkv.export.cards import resolve_model
    from starkv.export.export_model import export_model
    from starkv.export.quantize.presets import PRESETS

    root = tmp_path_factory.mktemp("gui-tiny")
    resolved = resolve_model("gui-tiny")
    export_model(resolved.folder, resolved.card, root / "export", PRESETS["fp32"])
    build_ort_engine(root / "export", root / "engine")
    return root / "engine"


@pytest.fixture(scope="session")
def screenshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A noisy PNG of 200 x 150 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    path = tmp_path_factory.mktemp("screens") / "screen.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def starkv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> "Command":
    """The command, run in an empty directory."""
    from command import Command

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("STARKV_ENGINES", raising=False)
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="session")
def served_tokenizer(babbling: ChatModel) -> "ChatTokenizer":
    """Tokenizer of the fake engine."""
    from starkv.runtime.preprocess.tokenizer import ChatTokenizer

    return ChatTokenizer.from_directory(babbling.engine)


@pytest.fixture
def served_engine(babbling: ChatModel, served_tokenizer: "ChatTokenizer") -> "FakeEngine":
    """An engine that says letters and notes what it was asked."""
    from fake_engine import FakeEngine

    from starkv.manifest import read_manifest

    manifest = read_manifest(babbling.engine).model_copy(update={"max_context": 8192})
    return FakeEngine(manifest, [served_tokenizer.encode(letter)[0] for letter in "abcdefghijklmnop"])


@pytest.fixture
def server(served_engine: "FakeEngine", served_tokenizer: "ChatTokenizer") -> "Iterator[Server]":
    """An HTTP server of the fake engine."""
    from served import serving

    with serving(served_engine, served_tokenizer) as running:
        yield running


@pytest.fixture
def plain(starkv: "Command", packed: "PackedEngines") -> Path:
    """A copy of the engine that ``packed`` are made of, in the command's directory."""
    return Path(shutil.copytree(packed.plain, "engine"))
