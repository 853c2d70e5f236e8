# SPDX-License-Identifier: Apache-2.0
"""Model cards: one TOML file per supported model under ``models/``."""

import difflib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from starkv.errors import CheckpointError, UsageError
from starkv.export.hub import Download, find_checkpoint
from starkv.manifest import CoordinateConvention, PromptDialect

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CARDS_DIRECTORY = Path(__file__).parent.parent / "models"
FAMILY_PIXELS = (3136, 12_845_056)
"""Smallest and largest image of the Qwen2-VL and Qwen2.5-VL processors, in pixels."""

# What a family writes; a model that writes something else has a card that says so.
_COORDINATES: dict[str, CoordinateConvention] = {
    "qwen2_5_vl": "absolute",
    "qwen2_vl": "relative_1000",
    "opencua": "absolute",
}


class ModelCard(BaseModel):
    """What starkv must know about a model beyond its checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    family: str
    source: str = ""
    """Repository on the Hugging Face Hub, where the weights don't come with starkv."""
    folder: str = ""
    """Folder with the weights, relative to the cards, where they do."""
    licence: str
    """Of the weights."""
    licence_url: str = ""
    research_only: bool = False
    """Whether the licence forbids commercial use."""
    coordinates: CoordinateConvention
    prompt: PromptDialect
    min_pixels: int
    max_pixels: int
    quantization: str
    observation_window: int
    max_context: int
    kv_budget: float = 1.0
    """Share of a prompt's KV rows that is kept where the user doesn't say."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> "ModelCard":
        if bool(self.source) == bool(self.folder):
            raise ValueError("give one of source (a Hub repository) and folder")
        if not 0.0 < self.kv_budget <= 1.0:
            raise ValueError("kv_budget must be over 0 and at most 1")
        return self

    @property
    def origin(self) -> str:
        """Where the weights come from, never a path of this machine."""
        return self.source or Path(self.folder).name


@dataclass(frozen=True)
class ResolvedModel:
    """A card and the folder that holds its checkpoint."""

    card: ModelCard
    folder: Path


def card_names() -> list[str]:
    """Names of all cards, sorted."""
    return sorted(path.stem for path in CARDS_DIRECTORY.glob("*.toml"))


def load_card(name: str) -> ModelCard:
    """Read the card called ``name``.

    Raises:
        UsageError: no such card (the message suggests the nearest name) or a field is wrong.
    """
    path = CARDS_DIRECTORY / f"{name}.toml"
    if name not in card_names():
        near = difflib.get_close_matches(name.lower(), card_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(card_names())}"
        raise UsageError(f"unknown model {name!r}; {hint}")
    try:
        return ModelCard.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"model card {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "source"
        raise UsageError(f"model card {path}: field {field}: {first['msg']}") from None


def is_folder(model: str) -> bool:
    """Whether a user who says ``model`` means a folder, there or not, rather than a card."""
    return Path(model).is_dir() or os.sep in model


def resolve_model(
    model: str, checkpoint: Path | None = None, download: Download | None = None
) -> ResolvedModel:
    """Find the card and the checkpoint of a card's name or of a Hugging Face folder.

    Args:
        model: card's name, or a folder.
        checkpoint: folder with the weights of a card.
        download: fetches a repository; the Hub by default.

    Raises:
        CheckpointError: a folder that doesn't exist, has no readable processor configuration, or weights that
            are found nowhere.
        UsageError: as :func:`load_card`, or ``checkpoint`` beside a folder or a card that has one.
    """
    if is_folder(model):
        if checkpoint is not None:
            raise UsageError(f"{model} is a folder with weights already; leave --checkpoint out")
        return ResolvedModel(card_of_folder(Path(model)), Path(model))
    card = load_card(model)
    if card.folder and checkpoint is not None:
        raise UsageError(f"{model} comes with its weights; leave --checkpoint out")
    if card.folder:
        return ResolvedModel(card, CARDS_DIRECTORY / card.folder)
    return ResolvedModel(card, find_checkpoint(card.name, card.source, checkpoint, download))


def card_of_folder(folder: Path, limits: tuple[int, int] | None = None) -> ModelCard:
    """A card for a checkpoint that has none: its own pixel limits, the plain prompt.

    Args:
        folder: the checkpoint.
        limits: smallest and largest image in pixels where it has no ``preprocessor_config.json``.

    Raises:
        CheckpointError: the folder or its ``preprocessor_config.json`` is missing or unreadable.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint folder {folder} does not exist; known cards: {', '.join(card_names())}"
        )
    smallest, largest = _pixel_limits(folder / "preprocessor_config.json", limits)
    family = _model_type(folder / "config.json")
    return ModelCard(
        name=folder.resolve().name,
        family=family,
        licence="that of the checkpoint (see its folder)",
        folder=str(folder.resolve()),
        coordinates=_COORDINATES.get(family, "absolute"),
        prompt="plain",
        min_pixels=smallest,
        max_pixels=largest,
        quantization="int8",
        observation_window=64,
        max_context=32768,
    )


def config_of_card(card: ModelCard) -> Path:
    """The ``config.json`` with the sizes of a card's model, which comes with starkv."""
    if card.folder:
        return CARDS_DIRECTORY / card.folder / "config.json"
    return CARDS_DIRECTORY / "configs" / f"{card.name}.json"


def _pixel_limits(path: Path, default: tuple[int, int] | None) -> tuple[int, int]:
    if default is not None and not path.exists():
        return default
    try:
        processor = json.loads(path.read_text())
        size = processor.get("size") or {}
        smallest = processor.get("min_pixels") or size["shortest_edge"]
        largest = processor.get("max_pixels") or size["longest_edge"]
        return int(smallest), int(largest)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy it from the model's repository") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no usable pixel limits ({error!r}); it needs min_pixels and max_pixels"
        ) from None


def _model_type(path: Path) -> str:
    """What a checkpoint calls its family; a config that can't be read is refused when it is exported."""
    try:
        config: Any = json.loads(path.read_text())
        return str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return "qwen2_5_vl"
