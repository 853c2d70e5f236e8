# SPDX-License-Identifier: Apache-2.0
"""Reads annotation files: everything that is wrong is named by file, entry and field."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from starkv.errors import UsageError
from starkv.evaluation.samples import Loaded, Problem
from starkv.manifest import sha256_of


class Entry(BaseModel):
    """Base of what an annotation file holds; fields that nobody reads are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


AnyEntry = TypeVar("AnyEntry", bound=Entry)


class UnreadableFileError(UsageError):
    """An annotation file is no JSON of the form it should have."""


def read_json(path: Path, form: type) -> object:
    """Read a whole annotation file.

    Args:
        path: the file.
        form: ``list`` or ``dict``.

    Raises:
        UnreadableFileError: it can't be read, or holds something else.
    """
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{path} can't be read: {error}") from None
    if not isinstance(content, form):
        wanted = "list of entries" if form is list else "object"
        raise UnreadableFileError(f"{path} holds no {wanted}")
    return content


def read_entries(
    path: Path, model: type[AnyEntry], loaded: Loaded, label: str = "entry"
) -> Iterator[tuple[str, AnyEntry]]:
    """Check the entries of a list; wrong ones become problems.

    Args:
        path: the file.
        model: form of an entry.
        loaded: gets the file and its problems.
        label: what an entry is called in messages.

    Yields:
        Name of the entry in messages, and the entry.

    Raises:
        UnreadableFileError: the file holds no list.
    """
    content = read_json(path, list)
    loaded.annotations.append(path)
    assert isinstance(content, list)
    for number, raw in enumerate(content):
        where = f"{label} {number}"
        try:
            yield where, model.model_validate(raw)
        except ValidationError as error:
            loaded.problems.append(Problem(path.name, where, first_error(error)))


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong with an entry, with its field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "the entry"
    more = error.error_count() - 1
    return f"{field}: {first['msg']}" + (f" (and {more} more)" if more else "")


def find_image(name: str, folders: Sequence[Path]) -> Path | str:
    """The image called ``name`` in the first folder that has it, or why there is none."""
    for folder in folders:
        path = folder / name
        try:
            # Annotations come from elsewhere; they have no business outside the data set.
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{name!r} leads out of the data set"
            if path.is_file():
                return path
        except (OSError, ValueError):
            return f"{name[:40]!r} is no name of a file"
    return f"image {name!r} is missing in {' and '.join(str(folder) for folder in folders)}"


def data_hash(loaded: Loaded) -> str:
    """Names a data set: by its own word, or sha256 of its annotations and its images' names and sizes."""
    if loaded.identity:
        return loaded.identity
    digest = hashlib.sha256()
    for path in loaded.annotations:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    for image in sorted(_images(loaded)):
        digest.update(f"{image.name} {image.stat().st_size}\n".encode())
    return digest.hexdigest()


def _images(loaded: Loaded) -> Iterable[Path]:
    return {sample.image for sample in loaded.samples if isinstance(sample.image, Path)}
