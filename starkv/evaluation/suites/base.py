# SPDX-License-Identifier: Apache-2.0
"""What a data set has to say about itself, and the names of all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from starkv.errors import UsageError
from starkv.evaluation.metrics import Metric
from starkv.evaluation.records import Record
from starkv.evaluation.samples import Level, Loaded
from starkv.manifest import PromptDialect


class LayoutError(UsageError):
    """A folder is not laid out as the data set is published."""

    def __init__(self, directory: Path, suite: str, expected: str) -> None:
        super().__init__(f"{directory} is no {suite} data set: expected {expected}; see docs/evaluation.md")


@dataclass(frozen=True)
class Suite:
    """Questions of one kind with their rules."""

    name: str
    summarise: Callable[[Sequence[Record]], list[Metric]]
    """Figures as the official driver puts them together; the first is the one that is published."""
    ui_tars_dialect: PromptDialect
    """Words of the prompt for models that know UI-TARS's."""
    max_new_tokens: int
    """Longest reply, that of the official driver."""


@dataclass(frozen=True)
class PublicSuite(Suite):
    """A public data set, which lies in a folder."""

    load: Callable[[Path, Level], Loaded]
    """Reads the folder; raises a ``UsageError`` if it holds something else."""


def checked_directory(directory: Path, suite: str, expected: str) -> None:
    """Refuse what is no directory.

    Raises:
        LayoutError: it is none.
    """
    if not directory.is_dir():
        raise LayoutError(directory, suite, f"a directory with {expected}")
