# SPDX-License-Identifier: Apache-2.0
"""What ``starkv eval`` asks: a public data set in a folder, or samples that are drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.errors import UsageError

if TYPE_CHECKING:
    from starkv.evaluation.samples import Loaded
    from starkv.evaluation.suites.base import Suite

DEFAULT_TASK, DEFAULT_SPLIT, DEFAULT_COUNT, DEFAULT_SEED = "click", "test", 100, 0


@dataclass(frozen=True)
class SourceChoice:
    """Suite and where its samples come from, as given; None is what was left out."""

    suite: str
    data: Path | None
    level: str
    limit: int | None
    task: str | None
    count: int | None
    seed: int | None
    split: str | None

    @property
    def place(self) -> str:
        """Where the samples come from, in messages."""
        return str(self.data or f"the suite {self.suite}")

    def read(self) -> tuple["Suite", "Loaded"]:
        """The suite and its samples.

        Raises:
            UsageError: no such suite, task, split or level; options of the other kind of suite; a folder that
                is missing or holds something else.
        """
        from starkv.evaluation.suites.registry import SYNTHETIC_NAME, find_suite

        if self.suite == SYNTHETIC_NAME:
            return self._drawn()
        chosen = find_suite(self.suite)
        drawing = {"--task": self.task, "--n": self.count, "--seed": self.seed, "--split": self.split}
        for option, value in drawing.items():
            if value is not None:
                raise UsageError(f"{option} is for --suite {SYNTHETIC_NAME}; leave it out of {self.suite}")
        if self.data is None:
            raise UsageError(f"--suite {self.suite} needs --data: the folder of the data set")
        from starkv.evaluation.plan import parse_level

        return chosen, chosen.load(self.data, parse_level(self.level))

    def _drawn(self) -> tuple["Suite", "Loaded"]:
        from starkv.evaluation.suites.synthetic import SYNTHETIC, load, parse_split, parse_task

        if self.data is not None:
            raise UsageError(f"--suite {self.suite} draws its samples; leave --data out")
        if self.limit is not None:
            raise UsageError(f"--suite {self.suite} takes the number of samples as --n; leave --limit out")
        task = parse_task(DEFAULT_TASK if self.task is None else self.task)
        split = parse_split(DEFAULT_SPLIT if self.split is None else self.split)
        seed = DEFAULT_SEED if self.seed is None else self.seed
        return SYNTHETIC, load(task, split, seed, DEFAULT_COUNT if self.count is None else self.count)
