# SPDX-License-Identifier: Apache-2.0
"""Records of a run, one line of JSON per sample, and the settings under which they were made."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from starkv import __version__
from starkv.errors import UsageError
from starkv.validation.report import write_text

RECORDS_FILE, SETTINGS_FILE = "records.jsonl", "settings.json"


class Identified(BaseModel):
    """Base of what is written down of a sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str


AnyRecord = TypeVar("AnyRecord", bound=Identified)


class Record(Identified):
    """What a model answered to one sample."""

    group: str
    facets: dict[str, str]
    reply: str
    action: dict[str, object] | None
    """First action as JSON, with model and screen coordinates; None if the reply is no action."""
    point: tuple[float, float] | None
    """Its place in pixels of the screenshot, not moved onto the screen; graders look at this one."""
    error: str | None
    """Why the reply is no action."""
    grades: dict[str, float]
    """Rule → grade."""
    distance: float | None = None
    """Pixels from the place to the middle of the right box; None without a place, or where none is known."""
    kv_tokens_full: int
    kv_tokens_kept: float
    timings: dict[str, float]


class KvSettings(BaseModel):
    """Compression of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    mode: str
    budget: float
    capacity: int | None


class Settings(BaseModel):
    """Everything that a sample's answer depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    starkv: str = __version__
    """Rules and engines may change with it."""
    suite: str
    data: str
    """Hash of the data set."""
    engine: str
    """Name of its model."""
    engine_hash: str
    """Hash of its manifest, which holds those of all its files."""
    kv: KvSettings
    dialect: str
    level: str
    max_new_tokens: int
    images: int
    """Most screenshots of a prompt."""


class RecordFile(Generic[AnyRecord]):
    """The records of one run in a directory.

    Args:
        directory: made if it is missing.
        settings: of the run.
        form: of a record.

    Raises:
        UsageError: the directory holds records of other settings, or what it holds can't be read.
    """

    def __init__(self, directory: Path, settings: BaseModel, form: type[AnyRecord]) -> None:
        self.directory = directory
        self._path = directory / RECORDS_FILE
        _check_settings(directory / SETTINGS_FILE, settings, self._path)
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / SETTINGS_FILE, settings.model_dump_json(indent=2) + "\n")
        self.records = {record.id: record for record in read_records(self._path, form)}
        """By the samples' names."""

    def keep(self, ids: Iterable[str]) -> None:
        """Drop all records but these, and what was left of a line that was never finished."""
        wanted = set(ids)
        self.records = {name: record for name, record in self.records.items() if name in wanted}
        lines = "".join(record.model_dump_json() + "\n" for record in self.records.values())
        write_text(self._path, lines)

    def add(self, record: AnyRecord) -> None:
        """Write a record down at once: nothing but the sample at work is lost in a kill."""
        self.records[record.id] = record
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(record.model_dump_json() + "\n")


def _check_settings(path: Path, settings: BaseModel, records: Path) -> None:
    if not path.exists():
        if records.exists():
            raise UsageError(f"{records.parent} has {records.name} without {path.name}; choose another --out")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} can't be read: {error}; choose another --out") from None
    differences = list(_differences(found, settings.model_dump(mode="json")))
    if differences:
        raise UsageError(
            f"{path.parent} holds another run: {'; '.join(differences[:3])}; choose another --out"
        )


def _differences(found: object, wanted: Mapping[str, object], prefix: str = "") -> Iterable[str]:
    if not isinstance(found, Mapping):
        yield f"{prefix.rstrip('.') or SETTINGS_FILE} is no object there"
        return
    for name, value in wanted.items():
        there = found.get(name)
        if isinstance(value, Mapping):
            yield from _differences(there, value, f"{prefix}{name}.")
        elif there != value:
            yield f"{prefix}{name} is {_short(there)} there and {_short(value)} here"
    for name in [name for name in found if name not in wanted]:
        yield f"{prefix}{name} is there and not here"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def read_records(path: Path, form: type[AnyRecord]) -> Iterable[AnyRecord]:
    """Records of a file, none if it is missing.

    Args:
        path: the file.
        form: of a record.

    Raises:
        UsageError: a line is no record of that form.
    """
    if not path.exists():
        return
    *lines, rest = path.read_bytes().split(b"\n")
    # A line without its end was being written when the run was killed.
    del rest
    for number, line in enumerate(lines, 1):
        try:
            yield form.model_validate_json(line)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UsageError(
                f"{path}, line {number} is no record: {reason}; delete the line to ask it again"
            ) from None
