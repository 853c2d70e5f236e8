# SPDX-License-Identifier: Apache-2.0
"""Model cards: one TOML file per supported model under ``models/``."""

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from starkv.errors import UsageError
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
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise UsageError(f"model card {path}: {error}") from None


def resolve_model(name: str) -> ResolvedModel:
    """Find the card and the checkpoint's folder.

    Raises:
        UsageError: as :func:`load_card`.
    """
    card = load_card(name)
    return ResolvedModel(card, CARDS_DIRECTORY / card.folder)
