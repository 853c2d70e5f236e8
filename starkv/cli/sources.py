# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a model come from, and what else its export needs, for ``export`` and ``build``."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.cli.licence import note_licence
from starkv.errors import UsageError

if TYPE_CHECKING:
    from starkv.calibration.sequences import PromptCalibration
    from starkv.export.cards import ModelCard
    from starkv.export.progress import Progress
    from starkv.export.quantize.presets import Preset


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about weights."""

    checkpoint: Path | None = None
    """Folder with a card's weights, or where random ones are kept."""
    random_weights: bool = False
    random_dtype: str | None = None
    layers: int | None = None
    calibration: Path | None = None
    """Folder with calibration prompts; drawn ones if None."""
    calibrates_cache: bool = False
    """The prompts also serve the packing of a KV cache."""

    def __post_init__(self) -> None:
        if not self.random_weights and (self.random_dtype is not None or self.layers is not None):
            raise UsageError("--random-dtype and --layers are about random weights; add --random-weights")

    @property
    def shape_weights(self) -> bool:
        """Whether they say anything that an export needs to know."""
        calibration = None if self.calibrates_cache else self.calibration
        return replace(self, calibration=calibration, calibrates_cache=False) != SourceOptions()


@dataclass(frozen=True)
class Source:
    """A model that is about to be exported."""

    card: "ModelCard"
    preset: "Preset"
    calibration: "PromptCalibration | None"
    _options: SourceOptions
    _place: Path
    """Folder of the checkpoint, or the ``config.json`` that random weights are made for."""

    @contextmanager
    def checkpoint(self, out: Path, progress: "Progress") -> Iterator[Path]:
        """The folder with the weights; random ones exist as long as the block runs.

        Args:
            out: of the export; a checkpoint that is made up lies beside it.
            progress: told about the tensors of such a one.
        """
        if not self._options.random_weights:
            yield self._place
            return
        from starkv.cli.random_weights import random_checkpoint

        options = self._options
        with random_checkpoint(
            self.card, self._place, out, options.checkpoint, options.random_dtype, options.layers, progress
        ) as folder:
            yield folder


def find_source(model: str, quantization: str | None, options: SourceOptions) -> Source:
    """Settle card, quantization and checkpoint of a model; says its licence.

    Args:
        model: card's name, or a checkpoint's folder.
        quantization: preset; the card's if None.
        options: what the user says about weights.

    Raises:
        StarkvError: nothing is called so, weights are found nowhere, or options contradict each other.
    """
    from starkv.export.cards import resolve_model
    from starkv.export.checkpoint import Checkpoint
    from starkv.export.quantize.presets import load_preset, preset_for

    if options.random_weights:
        from starkv.cli.random_weights import card_for_random_weights

        card, place = card_for_random_weights(model)
        preset = load_preset(quantization or card.quantization)
    else:
        resolved = resolve_model(model, options.checkpoint)
        card, place = resolved.card, resolved.folder
        note_licence(card)
        preset = load_preset(quantization or card.quantization)
        with Checkpoint(place) as checkpoint:
            preset = preset_for(preset, checkpoint.quantization)
    return Source(card, preset, _calibration(preset, card, options), options, place)


def _calibration(preset: "Preset", card: "ModelCard", options: SourceOptions) -> "PromptCalibration | None":
    """Calibration prompts for a preset that needs them.

    Raises:
        UsageError: there is a folder of prompts and nothing to calibrate, or a prompt is wrong.
        ImageError: an image can't be read.
    """
    if not preset.calibrated:
        if options.calibration is not None and not options.calibrates_cache:
            raise UsageError(
                f"--calibration is for --quant int4-awq, --kv-quant and --kv-rank; {preset.name} takes no "
                "prompts"
            )
        return None
    _check_calibration_packages(preset.name)
    from starkv.calibration.prompts import prompts_from
    from starkv.calibration.sequences import PromptCalibration

    return PromptCalibration(card, prompts_from(options.calibration, card.max_pixels))


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
