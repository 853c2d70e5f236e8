# SPDX-License-Identifier: Apache-2.0
"""gui-tiny exported, and built for the fake TensorRT."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fake_cuda import FakeCuda
from fake_tensorrt.context import view
from fake_tensorrt.state import State
from PIL import Image

from starkv.export.build.ort import build_ort_engine
from starkv.export.build.trt import build_trt_engine
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.export.cards import load_card
from starkv.export.export_model import export_model
from starkv.export.quantize.presets import load_preset
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Engine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SCREEN_FILE = ROOT / "examples" / "screen.png"
SCREEN = Image.open(SCREEN_FILE).crop((0, 224, 224, 448))
"""Small, because most of what runs on the fakes is emulated."""
PRESETS = ("fp32", "int4")
_ELF = 4096
"""Bytes of a program, which the fake takes for a library."""


@dataclass(frozen=True)
class Exports:
    """gui-tiny in several forms."""

    folders: dict[str, Path]
    """Preset → export."""
    processor_engine: Path
    """For ONNX Runtime, in float32."""

    @classmethod
    def make(cls, root: Path) -> "Exports":
        folders = {preset: root / preset for preset in PRESETS}
        for preset, folder in folders.items():
            export_model(ROOT / "models" / "gui-tiny", load_card("gui-tiny"), folder, load_preset(preset))
        build_ort_engine(folders["fp32"], root / "engine")
        return cls(folders, root / "engine")


def plugin_library(folder: Path) -> Path:
    """A file that the fake takes for the plugins."""
    library = folder / "libstarkv_trt.so"
    with Path(sys.executable).resolve().open("rb") as program:
        library.write_bytes(program.read(_ELF))
    return library


def build_tensorrt_engine(exported: Path, out: Path, **options: Any) -> Path:
    """Build an engine with the installed fake."""
    plugins = plugin_library(out.parent)
    build_trt_engine(exported, out, TrtBuildOptions(plugins=plugins, **options))
    return out


def open_tensorrt_engine(state: State, exported: Path, out: Path, **options: Any) -> TrtEngine:
    """Build an engine and open it on the fake's card."""
    build_tensorrt_engine(exported, out, **options)
    kernels: Any = FakeKernels(state.cuda)
    return TrtEngine(out, threads=1, cuda=state.cuda, kernels=kernels)


def agent_of(engine: Engine) -> Agent:
    folder: Path = engine._directory  # type: ignore[attr-defined]
    return Agent(engine, ChatTokenizer.from_directory(folder))


@dataclass(frozen=True)
class FakeKernels:
    """The kernels' library on the fake card: picks tokens, on a stream."""

    cuda: FakeCuda

    def call(self, function: str, *arguments: Any) -> None:
        assert function == "starkv_argmax"
        logits, ids, sequences, vocabulary, stream = arguments

        def run() -> None:
            rows = view(logits, (sequences, vocabulary), np.float32, "logits")
            view(ids, (sequences,), np.int32, "ids")[:] = rows.argmax(1)

        self.cuda.submit(stream, run, function)
