# SPDX-License-Identifier: Apache-2.0
"""What benchmarks that ask the synthetic suite share: their command line, and a run with its progress."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from running import SUITES, TRAJECTORY, Answered, Asks, run

from starkv.errors import StarkvError, UsageError
from starkv.evaluation.records import AnyRecord, RecordFile
from starkv.synthetic.suite import SPLITS


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints a module's docstring as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def suite_parser(
    description: str | None, count: int, budgets: Sequence[float], out: str
) -> argparse.ArgumentParser:
    """Options of every such benchmark.

    Args:
        description: the module's docstring.
        count: questions of each task by default.
        budgets: by default.
        out: what the directory holds.
    """
    parser = plain_parser(description)
    parser.add_argument("--engine", required=True, help="directory, or name of a model")
    parser.add_argument("--quant", default="fp32", help="preset of a model's engine (default: %(default)s)")
    parser.add_argument("--task", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--split", choices=SPLITS, help="default: test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--count", type=int, default=count, help="questions of each task (default: %(default)s)"
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=list(budgets))
    parser.add_argument("--out", type=Path, required=True, help=f"directory of {out}")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, help="default: all processors that may be used")
    return parser


def check_numbers(args: argparse.Namespace, *positive: str) -> None:
    """Refuse numbers that make no sense.

    Args:
        args: of :func:`suite_parser`.
        positive: further options that are at least 1.

    Raises:
        UsageError: one is too small.
    """
    for name in ("count", "max_new_tokens", *positive):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.seed < 0:
        raise UsageError(f"--seed must be at least 0, not {args.seed}")


def ask_suite(
    args: argparse.Namespace,
    suite: str,
    count: int,
    asker: Asks[Answered],
    records: "RecordFile[AnyRecord]",
    name: str | None = None,
) -> None:
    """Ask what is not answered yet, with a bar on stderr.

    Args:
        args: of :func:`suite_parser`.
        suite: one of ``SUITES``.
        count: questions.
        asker: asks one question.
        records: of the answers.
        name: of the bar; the suite's by default.

    Raises:
        StarkvError: a question can't be asked.
    """
    # Drops a line that was cut off, behind which nothing could be written.
    records.keep(list(records.records))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(name or suite, total=count)
        samples = SUITES[suite](args.split, args.seed, count)
        run(samples, suite == TRAJECTORY, asker, records, partial(bars.advance, bar))


def run_command(main: Callable[[], None]) -> None:
    """Run a benchmark; bad input is one line on stderr and exit code 2."""
    try:
        main()
    except StarkvError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
