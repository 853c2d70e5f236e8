# SPDX-License-Identifier: Apache-2.0
"""What is written down: one record per question, with the answers of all rows at all budgets."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from rows import Place

from starkv import __version__
from starkv.evaluation.records import Identified


class Cell(BaseModel):
    """What one row answered to one question at one budget."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    """The reply."""
    point: tuple[float, float] | None
    """Where it clicks, in pixels of the last screenshot; None if it does not."""
    hit: bool
    distance: float | None
    """Pixels to the middle of the box; None without a click."""
    rows: float
    """Rows kept of the prompt, mean over the layers."""
    bytes: int
    """Bytes that they held before the reply."""
    acted: tuple[str, ...] = ()
    """Parts of STaR-KV that had a say, see ``components.py``."""


class TableRecord(Identified):
    """One question."""

    task: str
    group: str
    """Its screen or episode."""
    frames: int
    size: tuple[int, int]
    """Width and height of the screenshots in pixels."""
    prompt_rows: int
    full_bytes: int
    """Of the uncompressed prompt."""
    cells: dict[str, dict[str, Cell]]
    """Row → budget, such as ``0.2`` → answer."""


class TableSettings(BaseModel):
    """Everything that the answers depend on, but for the question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    starkv: str = __version__
    engine: str
    """Name of its model."""
    engine_hash: str
    """Hash of its manifest, which holds those of all its files."""
    place: Place
    suite: str
    split: str
    seed: int
    max_new_tokens: int
    budgets: list[float]
    rows: dict[str, dict[str, object]]
    """Row → method and hyper-parameters."""


def budget_key(budget: float) -> str:
    """A budget as records name it."""
    return f"{budget:g}"
