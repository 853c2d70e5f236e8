# SPDX-License-Identifier: Apache-2.0
"""Model cards: one TOML file per supported model under ``models/``."""

import difflib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from starkv.errors import CheckpointError, UsageError
from starkv.manifest import CoordinateConvention, PromptDialect

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CARDS_DIRECTORY = Path(__file__).parent.parent / "models"


class ModelCard(BaseModel):
    """What starkv must know about a model beyond its checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    family: str
    licence: str
    folder: str
    """Folder with the weights, relative to the cards."""
    coordinates: CoordinateConvention
    prompt: PromptDialect
    min_pixels: int
    max_pixels: int
    quantization: str
    observation_window: int
    max_context: int
    kv_budget: float = 1.0
    """Share of a prompt's KV rows that is kept where the user doesn't say."""


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
        near = difflib.get_close_matches(name, card_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(card_names())}"
        raise UsageError(f"unknown model {name!r}; {hint}")
    try:
        return ModelCard.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"model card {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"model card {path}: field {field}: {first['msg']}") from None


def resolve_model(model: str) -> ResolvedModel:
    """Find the card and the checkpoint of a card's name or of a Hugging Face folder.

    Raises:
        CheckpointError: a folder that doesn't exist, or has no readable processor configuration.
        UsageError: as :func:`load_card`.
    """
    folder = Path(model)
    if folder.is_dir() or os.sep in model:
        return ResolvedModel(card_of_folder(folder), folder)
    card = load_card(model)
    return ResolvedModel(card, CARDS_DIRECTORY / card.folder)


def card_of_folder(folder: Path) -> ModelCard:
    """A card for a checkpoint that has none: its own pixel limits, absolute coordinates, the plain prompt.

    Raises:
        CheckpointError: the folder or its ``preprocessor_config.json`` is missing or unreadable.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint folder {folder} does not exist; known cards: {', '.join(card_names())}"
        )
    path = folder / "preprocessor_config.json"
    try:
        processor = json.loads(path.read_text())
        size = processor.get("size") or {}
        smallest = processor.get("min_pixels") or size["shortest_edge"]
        largest = processor.get("max_pixels") or size["longest_edge"]
        return ModelCard(
            name=folder.resolve().name,
            family="qwen2_5_vl",
            licence="that of the checkpoint (see its folder)",
            folder=str(folder),
            coordinates="absolute",
            prompt="plain",
            min_pixels=smallest,
            max_pixels=largest,
            quantization="int8",
            observation_window=64,
            max_context=32768,
        )
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy it from the model's repository") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no usable pixel limits ({error!r}); it needs min_pixels and max_pixels"
        ) from None
