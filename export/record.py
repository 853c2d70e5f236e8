# SPDX-License-Identifier: Apache-2.0
"""``export.json`` of an exported model: what building an engine needs to know beyond the graphs."""

import json
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from starkv.errors import UsageError
from starkv.manifest import ModelDescription

SCHEMA_VERSION = 3
RECORD_NAME = "export.json"

Route = Literal["build", "trace"]
"""How the decoder's graph came about: written by a builder, or traced from the PyTorch model."""


def parse_route(name: str) -> Route:
    """Check a route's name.

    Raises:
        UsageError: no such route.
    """
    if name == "build":
        return "build"
    if name == "trace":
        return "trace"
    raise UsageError(f"unknown route {name!r}; known: build, trace")


class ExportRecord(ModelDescription):
    """The model, how it was exported, and into which files."""

    route: Route
    fingerprint: str
    """Names what the export was made from and how, see :mod:`starkv.export.fingerprint`."""
    files: list[str]
    """Every file of the directory but this one, sorted."""


def write_record(directory: Path, record: ExportRecord) -> None:
    """Write ``export.json``."""
    (directory / RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n")


def read_record(directory: Path) -> ExportRecord:
    """Read ``export.json`` and check that every file it names is there.

    Raises:
        UsageError: the directory is no export, or of another schema version, or incomplete.
    """
    path = directory / RECORD_NAME
    if not path.is_file():
        raise UsageError(
            f"{directory} is no exported model: it has no {RECORD_NAME}; run `starkv export` first"
        )
    try:
        record = ExportRecord.model_validate(json.loads(path.read_text()))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not readable JSON ({error}); export the model again") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: field {field}: {first['msg']}; export the model again") from None
    if record.schema_version != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: schema_version is {record.schema_version}, not {SCHEMA_VERSION}; export the model again"
        )
    for name in record.files:
        if not (directory / name).is_file():
            raise UsageError(f"{directory / name} is missing from the export; export the model again")
    return record
