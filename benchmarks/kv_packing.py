# SPDX-License-Identifier: Apache-2.0
"""Accuracy against bytes held: token eviction, quantized rows and low rank, alone and together.

    python benchmarks/kv_packing.py --engine gui-tiny --count 300 --out runs/kv-packing

Every question of the synthetic suite is prefilled once, evicted once per budget, and the kept rows are packed
in every way, so that all combinations answer from the very same rows. A run that was interrupted goes on
where it was. What packings need to know of the model's keys and values is measured on the suite's training
split.
"""

import argparse
import sys
from pathlib import Path

import common  # noqa: F401  (lets the modules of benchmarks/gui be found)
from packed_asking import PackedAsker
from packed_report import write_report
from packings import PackedRecord, PackedSettings, chosen_packings
from suite_run import ask_suite, check_numbers, run_command, suite_parser

from starkv.cli.console import progress
from starkv.cli.engines import find_engine
from starkv.cli.packing import pack_variants
from starkv.evaluation.records import RecordFile
from starkv.manifest import MANIFEST_NAME, read_manifest
from starkv.methods.budget import Budget
from starkv.runtime.agent import Agent
from starkv.runtime.engines.opening import open_engine

BUDGETS = [0.4, 0.2, 0.1]
_PACKED = "packed"
"""Folder of the packed engines beside the records."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without an engine.

    Raises:
        UsageError: a budget or a number makes no sense, or a packing is unknown.
    """
    parser = suite_parser(__doc__, 100, BUDGETS, "records, packed engines, report and plots")
    parser.add_argument("--packings", nargs="+", metavar="PACKING", help="only these, such as int8 r50-int4")
    args = parser.parse_args(arguments)
    args.budgets = sorted({Budget(budget).ratio for budget in args.budgets} - {1.0}, reverse=True)
    args.split = args.split or "test"
    check_numbers(args)
    args.packings = chosen_packings(args.packings)
    return args


def packed_engines(args: argparse.Namespace, plain: Path) -> dict[str, Path]:
    """The packed engines, those of an earlier run where they are of the same plain engine."""
    home = args.out / _PACKED
    found = {name: home / options.directory_suffix for name, options in args.packings.items()}
    stamp = home / "of.txt"
    engine_hash = read_manifest(plain).manifest_sha256
    known = stamp.read_text() if stamp.is_file() else ""
    if known == engine_hash and all((place / MANIFEST_NAME).is_file() for place in found.values()):
        return found
    home.mkdir(parents=True, exist_ok=True)
    with progress() as stages:
        pack_variants(plain, list(args.packings.values()), home, stages)
    stamp.write_text(engine_hash)
    return found


def fill(args: argparse.Namespace, plain: Path, packed: dict[str, Path]) -> None:
    """Ask all questions that are not answered yet.

    Raises:
        UsageError: the directory holds records of other settings.
        StarkvError: see :meth:`PackedAsker.ask`.
    """
    agent = Agent.load(plain, threads=args.threads)
    engines = {
        name: open_engine(place, verify=False, threads=args.threads, device="cpu")
        for name, place in packed.items()
    }
    manifests = {name: engine.manifest for name, engine in engines.items()}
    tokens = {
        manifest.kv_packing.calibration_tokens for manifest in manifests.values() if manifest.kv_packing
    }
    for suite in args.task:
        settings = PackedSettings(
            engine=agent.engine.manifest.name,
            engine_hash=agent.engine.manifest.manifest_sha256,
            suite=suite,
            split=args.split,
            seed=args.seed,
            max_new_tokens=args.max_new_tokens,
            budgets=args.budgets,
            packings={name: manifest.manifest_sha256 for name, manifest in manifests.items()},
            calibration_tokens=max(tokens, default=0),
        )
        records = RecordFile(args.out / suite, settings, PackedRecord)
        asker = PackedAsker(agent, engines, args.budgets, args.max_new_tokens)
        ask_suite(args, suite, args.count, asker, records)


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        StarkvError: bad input, see :func:`parse_arguments` and :func:`fill`.
    """
    args = parse_arguments(arguments)
    plain = find_engine(args.engine, args.quant, device="cpu")
    fill(args, plain, packed_engines(args, plain))
    write_report(args.out)
    print(f"report, table and plots are in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
