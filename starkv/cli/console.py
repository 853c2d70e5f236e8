# SPDX-License-Identifier: Apache-2.0
"""Where output goes: results to stdout, everything else to stderr."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# A path may hold anything: neither colons nor brackets in it must turn into pictures or styles.
results = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False)


def note(text: str) -> None:
    """One line for the reader on stderr, printed as it is."""
    errors.print(text, soft_wrap=True, markup=False)


def print_actions(actions: Iterable[Mapping[str, object]]) -> None:
    """Actions in their JSON form, one line each, on stdout."""
    for action in actions:
        fields = ", ".join(f"{name} {value}" for name, value in action.items() if name != "type")
        print(f"{action['type']}: {fields}")


def fail(message: str) -> None:
    """Print an error as one line on stderr."""
    errors.print("error:", style="bold red", end=" ")
    errors.print(" ".join(message.split()), soft_wrap=True, markup=False)


class StageProgress:
    """Draws the progress that ``export`` reports: one bar per stage, with the item at work."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def start(self, stage: str, total: int) -> None:
        self.finish()
        self._task = self._bars.add_task(stage, total=total, item="")

    def advance(self, item: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, advance=1, item=item)

    def finish(self) -> None:
        """Fill the current bar: a stage that is followed by another is over."""
        if self._task is not None:
            total = self._bars.tasks[self._task].total
            self._bars.update(self._task, completed=total, item="")


@contextmanager
def progress() -> Iterator[StageProgress]:
    """Progress bars on stderr."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[item]}", style="dim"),
    )
    with Progress(*columns, console=errors) as bars:
        stages = StageProgress(bars)
        yield stages
        stages.finish()
