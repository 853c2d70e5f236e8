# SPDX-License-Identifier: Apache-2.0
"""Ways to pack a cache that are compared, and what is written down of each question."""

from typing import Literal

from cells import Cell, TableRecord
from pydantic import BaseModel, ConfigDict

from starkv import __version__
from starkv.errors import UsageError
from starkv.kv_packing.options import PackingOptions
from starkv.methods.names import FULL

EVICTED = "float"
"""Row of the cache that is evicted and not packed. The whole float cache is the row ``full``."""
PACKINGS = {
    options.directory_suffix.removeprefix("kv-"): options
    for options in (
        PackingOptions("int8"),
        PackingOptions("int4"),
        PackingOptions("int8", 1.0),
        PackingOptions("int4", 1.0),
        PackingOptions("none", 0.75),
        PackingOptions("int8", 0.75),
        PackingOptions("int4", 0.75),
        PackingOptions("none", 0.5),
        PackingOptions("int8", 0.5),
        PackingOptions("int4", 0.5),
    )
}
"""By the rows' names, such as ``int8`` (static scales) or ``r50-int4`` (half rank, a scale per token)."""
LABELS = {
    FULL: "whole float cache",
    EVICTED: "float",
    "int8": "int8, static scales",
    "int4": "int4, static scales",
    "r100-int8": "int8, scales per token",
    "r100-int4": "int4, scales per token",
    "r75": "rank 75 %, float",
    "r75-int8": "rank 75 %, int8",
    "r75-int4": "rank 75 %, int4",
    "r50": "rank 50 %, float",
    "r50-int8": "rank 50 %, int8",
    "r50-int4": "rank 50 %, int4",
}


def chosen_packings(names: list[str] | None) -> dict[str, PackingOptions]:
    """The packings called so; all if there are no names.

    Raises:
        UsageError: there is no such packing.
    """
    unknown = sorted(set(names or ()) - PACKINGS.keys())
    if unknown:
        raise UsageError(f"unknown packing {unknown[0]!r}; known: {', '.join(PACKINGS)}")
    return {name: options for name, options in PACKINGS.items() if names is None or name in names}


class PackedCell(Cell):
    """What one packing answered to one question at one budget."""

    same: bool
    """Whether the reply is the whole float cache's."""
    divergences: tuple[float, ...]
    """KL divergence in nats from the whole float cache's distribution behind each token of its reply. The
    first token's own comes from the exact prefill and is not among them."""


class PackedRecord(TableRecord):
    """One question. ``bytes`` of a cell are what the packed rows and the newest, unpacked ones take before
    the reply, positions and scales included."""

    cells: dict[str, dict[str, PackedCell]]  # type: ignore[assignment]


class PackedSettings(BaseModel):
    """Everything that the answers depend on, but for the question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    starkv: str = __version__
    engine: str
    engine_hash: str
    """Of the plain engine."""
    suite: str
    split: str
    seed: int
    max_new_tokens: int
    budgets: list[float]
    packings: dict[str, str]
    """Name → hash of the packed engine."""
    calibration_tokens: int
