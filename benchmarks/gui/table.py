# SPDX-License-Identifier: Apache-2.0
"""The table: every KV method at every budget on synthetic GUI tasks, with significance and plots.

    python benchmarks/gui/table.py --engine gui-tiny --out runs/gui-table

Each question is prefilled once; every method and budget compacts that same arena into a slot of its own, and
those of one budget are decoded as one batch. A run that was interrupted goes on where it was.
"""

import argparse
import sys
from pathlib import Path

from asking import Asker
from cells import TableRecord, TableSettings
from report import write_report
from rows import Place, Row, chosen_rows, rows_of
from suite_run import ask_suite, check_numbers, run_command, suite_parser

from starkv.cli.engines import find_engine
from starkv.evaluation.records import RecordFile
from starkv.methods.budget import Budget
from starkv.runtime.agent import Agent
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

BUDGETS = [0.05, 0.1, 0.2, 0.4, 0.8]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without an engine.

    Raises:
        UsageError: a budget or a number makes no sense, or a row is unknown.
    """
    parser = suite_parser(__doc__, 1000, BUDGETS, "records, report, table and plots")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, such as full snapkv")
    parser.add_argument(
        "--ablations",
        action="store_true",
        help="native mode with one change off at a time, by default on the validation split",
    )
    parser.add_argument("--reference", type=Path, metavar="CHECKPOINT", help="also ask the PyTorch reference")
    parser.add_argument(
        "--reference-count", type=int, default=200, help="questions for it (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    args.split = args.split or ("validation" if args.ablations else "test")
    args.budgets = sorted({Budget(budget).ratio for budget in args.budgets})
    check_numbers(args, "reference_count")
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
        asker = Asker(agent, rows, args.budgets, args.max_new_tokens)
        ask_suite(args, suite, count, asker, records, name)


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
    run_command(main)
