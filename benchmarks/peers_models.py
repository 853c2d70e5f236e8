# SPDX-License-Identifier: Apache-2.0
"""The same random weights in every system's own format."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from peers_shapes import SIZES, checkpoint_config

from starkv.export.random_checkpoint import write_random_checkpoint

HERE = Path(__file__).parent
PRESET = "int4-small"
"""int4 in blocks of 128, the head included."""

STARKV, LLAMA_CPP, GENAI = "starkv", "llama.cpp", "ORT GenAI"
SYSTEMS = (STARKV, LLAMA_CPP, GENAI)


def prepare_model(system: str, size: str, scratch: Path, peers_python: Path) -> Path:
    """Path of the model of ``size`` for ``system`` under ``scratch``.

    It is made if it is not there; starkv's always, because it is this code that is measured.

    Raises:
        subprocess.CalledProcessError: it could not be made; the reason is on standard error.
    """
    folder = scratch / size
    checkpoint = folder / "checkpoint"
    target, make = _recipes(size, checkpoint, folder, peers_python)[system]
    if system == STARKV or not target.exists():
        write_random_checkpoint(checkpoint_config(SIZES[size]), checkpoint)
        print(f"{size}: writing the model of {system}", file=sys.stderr)
        make()
    return target


def weight_bytes(model: Path) -> int:
    """Size of a model's files with the weights of its text decoder."""
    if model.is_file():
        return model.stat().st_size
    names = ("decoder.data", "model.onnx.data")
    return sum((model / name).stat().st_size for name in names if (model / name).is_file())


def _recipes(
    size: str, checkpoint: Path, folder: Path, peers_python: Path
) -> dict[str, tuple[Path, Callable[[], None]]]:
    engine, gguf, genai = folder / "engine", folder / "model.gguf", folder / "genai"

    def build_engine() -> None:
        command = ["-m", "starkv.cli", "build", checkpoint, "--quant", PRESET, "--out", engine]
        _run(Path(sys.executable), *command)

    def build_gguf() -> None:
        _run(peers_python, HERE / "peers_gguf.py", checkpoint, size, gguf)

    def build_genai() -> None:
        partial = folder / "genai.partial"
        _run(
            peers_python,
            HERE / "peers_genai_build.py",
            checkpoint,
            size,
            partial,
            log=folder / "genai.build.log",
        )
        partial.rename(genai)

    return {STARKV: (engine, build_engine), LLAMA_CPP: (gguf, build_gguf), GENAI: (genai, build_genai)}


def _run(python: Path, *arguments: str | Path, log: Path | None = None) -> None:
    command = [str(python), *map(str, arguments)]
    if log is None:
        subprocess.run(command, check=True, stdout=sys.stderr)
        return
    with log.open("wb") as stream:  # thousands of lines of progress
        subprocess.run(command, check=True, stdout=stream, stderr=stream)
