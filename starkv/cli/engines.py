# SPDX-License-Identifier: Apache-2.0
"""Find the engine that a user names, and build it where there is none yet."""

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.cli.console import note, progress
from starkv.cli.licence import note_licence
from starkv.errors import UsageError
from starkv.manifest import MANIFEST_NAME, Manifest

if TYPE_CHECKING:
    from starkv.calibration.sequences import PromptCalibration
    from starkv.export.cards import ModelCard
    from starkv.export.quantize.presets import Preset


def engines_home() -> Path:
    """Directory of the engines that are found by name: ``$STARKV_ENGINES``, or ``engines`` here."""
    return Path(os.environ.get("STARKV_ENGINES", "engines"))


def engine_directory(name: str, backend: str, quantization: str) -> Path:
    """Where the engine of a model is kept."""
    return engines_home() / f"{name}-{backend}-{quantization}"


@contextmanager
def made_parents(target: Path) -> Iterator[None]:
    """Make the directories above ``target``; those that were missing vanish again if the block fails.

    Raises:
        UsageError: there is a file in the way.
    """
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{target} can't be made: {above} is no directory; choose another --out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def choose_backend(wanted: str) -> tuple[str, str]:
    """Settle ``auto``; returns the backend and why.

    Raises:
        UsageError: unknown backend, or one that this version can't build for.
    """
    if wanted in ("auto", "ort"):
        reason = "asked for" if wanted == "ort" else "the one backend that this version builds"
        return "ort", reason
    if wanted == "trt":
        raise UsageError("this version of starkv does not build TensorRT engines yet; use --backend ort")
    raise UsageError(f"unknown backend {wanted!r}; known: auto, ort, trt")


def build_engine(
    model: str,
    quantization: str | None,
    out: Path | None,
    prepack: bool = False,
    calibration: Path | None = None,
) -> tuple[Path, Manifest]:
    """Export the model beside the engine and build the engine from it.

    Args:
        model: card's name or checkpoint folder.
        quantization: preset; the card's if None.
        out: where to; among the engines that are found by name if None.
        prepack: also store the form compiled for this processor.
        calibration: folder of calibration prompts; drawn ones if None.

    Raises:
        StarkvError: see ``export_model`` and ``build_ort_engine``.
    """
    from starkv.export.build.ort import build_ort_engine
    from starkv.export.cards import resolve_model
    from starkv.export.checkpoint import Checkpoint
    from starkv.export.export_model import export_model
    from starkv.export.quantize.presets import load_preset, preset_for
    from starkv.export.resume import partial_directory
    from starkv.export.staging import check_replaceable

    resolved = resolve_model(model)
    note_licence(resolved.card)
    with Checkpoint(resolved.folder) as checkpoint:
        preset = preset_for(load_preset(quantization or resolved.card.quantization), checkpoint.quantization)
    target = out or engine_directory(resolved.card.name, "ort", preset.name)
    # The build checks it too, but that is minutes later for a large model.
    check_replaceable(target, MANIFEST_NAME)
    # Beside the engine, on the same file system; what was finished before an interruption is found again.
    exported = target.absolute().with_name(f".{target.name}.export")
    if exported.exists() or partial_directory(exported).exists():
        note(f"going on with an earlier run that was interrupted, see {exported.parent}")
    with made_parents(target), progress() as stages:
        export_model(
            resolved.folder,
            resolved.card,
            exported,
            preset,
            stages,
            calibration=calibration_for(preset, resolved.card, calibration),
            reuse=True,
        )
        manifest = build_ort_engine(exported, target, stages, prepack, link=True)
        shutil.rmtree(exported)
    return target, manifest


def calibration_for(preset: "Preset", card: "ModelCard", folder: Path | None) -> "PromptCalibration | None":
    """Calibration prompts for a preset that needs them.

    Raises:
        UsageError: there is a folder of prompts and nothing to calibrate, or a prompt is wrong.
        ImageError: an image can't be read.
    """
    if not preset.calibrated:
        if folder is not None:
            raise UsageError(f"--calibration is for --quant int4-awq; {preset.name} takes no prompts")
        return None
    _check_calibration_packages(preset.name)
    from starkv.calibration.prompts import prompts_from
    from starkv.calibration.sequences import PromptCalibration

    return PromptCalibration(card, prompts_from(folder, card.max_pixels))


def _check_calibration_packages(preset: str) -> None:
    """Refuse at once what would fail only after the vision tower is exported.

    Raises:
        UsageError: a package is missing.
    """
    for package in ("torch", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise UsageError(
                f"{preset} is calibrated with {package}; pip install 'starkv[calibrate]'"
            ) from None


def find_engine(name: str, quantization: str | None = None) -> Path:
    """Directory of the engine called ``name``; a model's engine that doesn't exist yet is built.

    Raises:
        UsageError: ``name`` is neither a directory nor a model.
    """
    if (Path(name) / MANIFEST_NAME).is_file():
        return Path(name)
    if Path(name).is_dir() or os.sep in name:
        raise UsageError(
            f"{name} is no engine directory (it has no {MANIFEST_NAME}); build one with `starkv build`"
        )
    from starkv.export.cards import load_card

    card = load_card(name)
    directory = engine_directory(name, "ort", quantization or card.quantization)
    if (directory / MANIFEST_NAME).is_file():
        return directory
    note(f"no engine at {directory} yet: building it once")
    return build_engine(name, quantization, None)[0]
