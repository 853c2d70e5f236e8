# SPDX-License-Identifier: Apache-2.0
"""Report, table and plots from the records alone.

python benchmarks/gui/report.py runs/gui-table
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cells import TableRecord, TableSettings
from components import COMPONENTS
from figures import ALL, Figure, figures_of
from plots import draw
from pydantic import ValidationError
from report_text import suite_sections
from running import SUITES
from suite_run import plain_parser, run_command

from starkv.errors import UsageError
from starkv.evaluation.records import RECORDS_FILE, SETTINGS_FILE, read_records
from starkv.synthetic.suite import CLICK_TASKS, TRAJECTORY_TASKS
from starkv.validation.report import write_text

SHARED = ("starkv", "engine", "engine_hash", "split", "seed")
"""Settings that all runs of a report have in common."""


@dataclass(frozen=True)
class SuiteRuns:
    """All that was asked of one suite: by the engine, and by the reference if it was."""

    suite: str
    settings: TableSettings
    records: list[TableRecord]


def read_runs(directory: Path) -> list[SuiteRuns]:
    """All runs in a directory, by suite.

    Raises:
        UsageError: there are none, they don't belong together, or one can't be read.
    """
    found: dict[str, SuiteRuns] = {}
    first: TableSettings | None = None
    for path in sorted(directory.glob(f"*/{SETTINGS_FILE}")):
        try:
            settings = TableSettings.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UsageError(f"{path} can't be read: {error.errors()[0]['msg']}") from None
        first = first or settings
        for name in SHARED:
            here, there = getattr(settings, name), getattr(first, name)
            if here != there:
                raise UsageError(f"{path}: {name} is {here}, but {there} in another run beside it")
        runs = found.setdefault(settings.suite, SuiteRuns(settings.suite, settings, []))
        runs.records.extend(read_records(path.parent / RECORDS_FILE, TableRecord))
    filled = [found[name] for name in SUITES if name in found and found[name].records]
    if not filled:
        raise UsageError(f"{directory} holds no records of the table")
    return filled


def write_report(directory: Path) -> None:
    """Write ``report.md``, ``table.csv`` and ``plots/`` beside the records.

    Raises:
        UsageError: see :func:`read_runs`.
    """
    figures: list[Figure] = []
    sections = []
    suites = read_runs(directory)
    for runs in suites:
        asked = {record.task for record in runs.records}
        tasks = [task for task in (*CLICK_TASKS, *TRAJECTORY_TASKS) if task in asked]
        of_suite = [figure for task in (ALL, *tasks) for figure in figures_of(runs.suite, runs.records, task)]
        figures += of_suite
        sections.append(suite_sections(runs.suite, runs.settings, runs.records, of_suite))
        draw(directory / "plots", runs.suite, of_suite)
    write_text(directory / "report.md", _heading(suites[0].settings) + "\n".join(sections))
    write_text(directory / "table.csv", as_csv(figures))


def _heading(settings: TableSettings) -> str:
    return (
        f"# KV compression on synthetic GUI tasks: {settings.engine}\n\n"
        f"Split `{settings.split}`, seed {settings.seed}, engine `{settings.engine_hash[:12]}`, starkv "
        f"{settings.starkv}, prompt mode, greedy decoding. All figures are in `table.csv`.\n\n"
        "A click is right inside the element's box. Intervals of accuracies are Wilson's, 95 %. "
        "A method is compared with another on the same questions at the same budget (the full cache has only "
        "one): difference of the accuracies in points with a 95 % bootstrap interval over whole screens or "
        "episodes (2,000 draws, seed 0), and the exact two-sided McNemar test after Holm's adjustment for "
        "all rows and budgets of that comparison: `*` p < 0.05, `**` p < 0.01, `***` p < 0.001. "
        "**The test takes questions for independent, which those of one screen or episode are not: where it "
        'and the interval disagree, trust the interval.** Rows marked "reference" run in PyTorch, in float32 '
        "as well, and may be asked fewer questions (n): their accuracies are about those, and so are their "
        "differences.\n\n"
    )


def as_csv(figures: Sequence[Figure]) -> str:
    """One line per suite, task, row and budget."""
    baselines = list(dict.fromkeys(name for figure in figures for name in figure.comparisons))
    plain: tuple[str, ...] = (
        "suite",
        "task",
        "row",
        "budget",
        "questions",
        "hits",
        "accuracy",
        "low",
        "high",
        "clicks",
    )
    plain += ("distance", "distance_share", "rows_share", "bytes_share", "bytes_mean")
    compared = ("questions", "difference", "low", "high", "p_value", "p_adjusted")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *plain,
            *(f"{name}_acted" for name in COMPONENTS),
            *(f"{field} vs {name}" for name in baselines for field in (*compared, "only_here", "only_there")),
        ]
    )
    for figure in figures:
        line = [_value(getattr(figure, name)) for name in plain]
        line += [str(figure.acted.get(name, 0)) if figure.row_is_star_kv else "" for name in COMPONENTS]
        for name in baselines:
            other = figure.comparisons.get(name)
            if other is None:
                line += [""] * (len(compared) + 2)
                continue
            line += [_value(getattr(other, field)) for field in compared]
            line += [str(other.discordance.only_first), str(other.discordance.only_second)]
        writer.writerow(line)
    return text.getvalue()


def _value(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("directory", type=Path, help="--out of table.py")
    write_report(parser.parse_args().directory)


if __name__ == "__main__":
    run_command(main)
