# SPDX-License-Identifier: Apache-2.0
"""The table: every KV method at every budget on synthetic GUI tasks, with significance and plots.

    python benchmarks/gui/table.py --engine gui-tiny --out runs/gui-table

Each question is prefilled once; every method and budget compacts that same arena into a slot of its own, and
those of one budget are decoded as one batch. A run that was interrupted goes on where it was.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from asking import Asker
from cells import TableRecord, TableSettings
from report import write_report
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rows import Place, Row, chosen_rows, rows_of
from running import SUITES, TRAJECTORY, run

from starkv.cli.engines import find_engine
from starkv.errors import StarkvError, UsageError
from starkv.evaluation.records import RecordFile
from starkv.methods.budget import Budget
from starkv.runtime.agent import Agent
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.synthetic.suite import SPLITS

BUDGETS = [0.05, 0.1, 0.2, 0.4, 0.8]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without an engine.

    Raises:
        UsageError: a budget or a number makes no sense, or a row is unknown.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", required=True, help="directory, or name of a model")
    parser.add_argument("--quant", default="fp32", help="preset of a model's engine (default: %(default)s)")
    parser.add_argument("--task", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--split", choices=SPLITS, help="default: test; with --ablations validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--count", type=int, default=1000, help="questions of each task (default: %(default)s)"
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of records, report, table and plots"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, such as full snapkv")
    parser.add_argument("--ablations", action="store_true", help="native mode with one change off at a time")
    parser.add_argument("--reference", type=Path, metavar="CHECKPOINT", help="also ask the PyTorch reference")
    parser.add_argument(
        "--reference-count", type=int, default=200, help="questions for it (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, help="default: all processors that may be used")
    args = parser.parse_args(arguments)
    args.split = args.split or ("validation" if args.ablations else "test")
    args.budgets = sorted({Budget(budget).ratio for budget in args.budgets})
    for name in ("count", "reference_count", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.seed < 0:
        raise UsageError(f"--seed must be at least 0, not {args.seed}")
    # Unknown rows are refused before anything is loaded.
    chosen_rows(rows_of("engine", args.ablations), args.rows)
    return args


def fill(args: argparse.Namespace, agent: Agent, place: Place, rows: tuple[Row, ...], count: int) -> None:
    """Ask all questions that are not answered yet.

    Raises:
        UsageError: the directory holds records of other settings.
        StarkvError: see :meth:`Asker.ask`.
    """
    manifest = agent.engine.manifest
    for suite in args.task:
        settings = TableSettings(
            engine=manifest.name,
            engine_hash=manifest.manifest_sha256,
            place=place,
            suite=suite,
            split=args.split,
            seed=args.seed,
            max_new_tokens=args.max_new_tokens,
            budgets=args.budgets,
            rows={row.name: row.settings() for row in rows},
        )
        name = suite if place == "engine" else f"{suite}-{place}"
        records = RecordFile(args.out / name, settings, TableRecord)
        # Drops a line that was cut off, behind which nothing could be written.
        records.keep(list(records.records))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(name, total=count)
            run(
                SUITES[suite](args.split, args.seed, count),
                suite == TRAJECTORY,
                Asker(agent, rows, args.budgets, args.max_new_tokens),
                records,
                partial(progress.advance, bar),
            )


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        StarkvError: bad input, see :func:`parse_arguments` and :func:`fill`.
    """
    args = parse_arguments(arguments)
    directory = find_engine(args.engine, args.quant, device="cpu")
    agent = Agent.load(directory, threads=args.threads)
    rows = chosen_rows(rows_of("engine", args.ablations), args.rows)
    fill(args, agent, "engine", rows, args.count)
    if args.reference:
        from starkv.runtime.engines.torch_reference import TorchReferenceEngine

        reference = TorchReferenceEngine.load(directory, args.reference, threads=args.threads)
        other = Agent(reference, ChatTokenizer.from_directory(directory))
        fill(
            args,
            other,
            "reference",
            rows_of("reference", args.ablations),
            min(args.count, args.reference_count),
        )
    write_report(args.out)
    print(f"report, table and plots are in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except StarkvError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
