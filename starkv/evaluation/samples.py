# SPDX-License-Identifier: Apache-2.0
"""What every data set is read into: samples to ask, and what was wrong with the rest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from starkv.evaluation.answers import Answer
from starkv.evaluation.boxes import Box
from starkv.evaluation.graders.desktop import DesktopAction
from starkv.runtime.actions.coordinates import Size

Level = Literal["high", "low"]
"""What AndroidControl tells the model: the goal alone, or the next step in words as well."""
Screenshot = Path | bytes
"""A file, or the bytes of one."""
Grades = Mapping[str, float]
"""Rule → how right the answer is, from 0 to 1. A rule that does not apply to a sample is left out."""


@dataclass(frozen=True)
class PastStep:
    """An earlier step of a trajectory, as it should have been."""

    image: Path
    thought: str
    summary: str
    """The step in words."""
    actions: tuple[DesktopAction, ...]


@dataclass(frozen=True)
class Sample:
    """One question of a data set."""

    id: str
    """Unique within the data set."""
    group: str
    """Samples of one group follow each other: a trajectory, whose compression remembers earlier steps."""
    image: Screenshot
    """What the user sees."""
    instruction: str
    facets: Mapping[str, str]
    """What figures are broken down by, such as ``{"platform": "web", "type": "icon"}``."""
    grade: Callable[[Answer], Grades]
    history: tuple[PastStep, ...] = ()
    """Earlier steps, oldest first."""
    earlier: tuple[Screenshot, ...] = ()
    """Earlier screenshots, oldest first, where nothing is told about what was done on them."""
    target: Box | None = None
    """Pixels of the image; how far a place is from its middle goes into the records."""
    image_size: Size | None = None
    """Of the image, where the data set says."""

    @property
    def source(self) -> str:
        """What the image is called in messages."""
        return self.image.name if isinstance(self.image, Path) else self.group


@dataclass(frozen=True)
class Problem:
    """Something of a data set that can't be asked."""

    file: str
    entry: str
    """Which entry of the file; empty if it is the file itself."""
    reason: str
    samples: int = 1
    """How many samples are lost by it."""

    def __str__(self) -> str:
        where = f"{self.file}, {self.entry}" if self.entry else self.file
        return f"{where}: {self.reason}"


@dataclass
class Loaded:
    """A data set as far as it could be read."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Parts of the data set that are not there."""
    annotations: list[Path] = field(default_factory=list)
    """Files that were read, in order."""
    identity: str = ""
    """Names the data where they come from no files."""
