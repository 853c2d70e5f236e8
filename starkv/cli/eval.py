# SPDX-License-Identifier: Apache-2.0
"""``starkv eval``: accuracy on public benchmarks and on drawn screens."""

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from starkv.cli.console import note, progress, results
from starkv.cli.eval_source import (
    DEFAULT_COUNT,
    DEFAULT_SEED,
    DEFAULT_SPLIT,
    DEFAULT_TASK,
    SourceChoice,
)
from starkv.cli.kv import KvBudget, KvCapacity, KvMethod, KvMode, KvOptions, KvQuant, KvRank
from starkv.cli.options import Device, Dialect, Engine, Json, NoVerify, Threads
from starkv.errors import UsageError

if TYPE_CHECKING:
    from starkv.evaluation.records import Record, RecordFile, Settings
    from starkv.evaluation.runner import Asking
    from starkv.evaluation.samples import Loaded, Problem, Sample
    from starkv.evaluation.summary import Summary


def evaluate(
    engine: Engine,
    suite: Annotated[
        str,
        typer.Option(
            help="screenspot-v2, screenspot-pro, android-control, agentnet-bench; or synthetic, which needs "
            "no data."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set, laid out as docs/evaluation.md says.", show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"synthetic: click or trajectory. [{DEFAULT_TASK}]", show_default=False),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", help=f"synthetic: samples. [{DEFAULT_COUNT}]", min=1, show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help=f"synthetic: of the drawing. [{DEFAULT_SEED}]", min=0, show_default=False),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help=f"synthetic: train, validation or test. [{DEFAULT_SPLIT}]", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Ask the first samples only.", min=1, show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for records and reports; a run that was interrupted goes on there.",
            show_default=False,
        ),
    ] = None,
    level: Annotated[
        str, typer.Option(help="android-control: ask with the goal (high) or also the next step (low).")
    ] = "high",
    kv_method: KvMethod = None,
    kv_budget: KvBudget = None,
    kv_capacity: KvCapacity = None,
    kv_mode: KvMode = "native",
    kv_quant: KvQuant = None,
    kv_rank: KvRank = None,
    dialect: Dialect = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest reply. The official driver's by default.", min=1, show_default=False),
    ] = None,
    threads: Threads = None,
    device: Device = "auto",
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Measure an engine's accuracy on a public benchmark or on drawn screens, graded by named rules.

    Example: [bold]starkv eval --suite screenspot-pro --data ScreenSpot-Pro --engine ui-tars-1.5-7b
    --kv-budget 0.2 --out runs/pro-20[/]

    Without any data: [bold]starkv eval --suite synthetic --task click --n 200 --engine gui-tiny[/]
    """
    from starkv.cli.engines import find_engine
    from starkv.evaluation.plan import parse_level, settings_of
    from starkv.evaluation.runner import Asking
    from starkv.evaluation.summary import summarise
    from starkv.manifest import read_manifest
    from starkv.runtime.agent import Agent
    from starkv.runtime.engines.base import check_kv_method
    from starkv.runtime.generation import SamplingParameters
    from starkv.runtime.prompts.dialects import parse_dialect

    source = SourceChoice(suite, data, level, limit, task, n, seed, split)
    words = parse_dialect(dialect) if dialect else None
    kv_options = KvOptions(kv_method, kv_budget, kv_capacity, kv_mode, kv_quant, kv_rank)
    told = parse_level(level)
    chosen, loaded = source.read()
    _tell(loaded)
    samples = loaded.samples[:limit]
    if not samples:
        raise UsageError(_nothing_left(source.place, loaded.problems))
    directory = find_engine(engine, device=device, packing=kv_options.packing)
    manifest = read_manifest(directory)
    policy = kv_options.policy(manifest)
    settings = settings_of(chosen, loaded, manifest, policy, kv_mode, told, words, max_new_tokens)
    # Refused before the engine is loaded: that takes minutes for a large one.
    records = _open(out, settings, samples)
    agent = Agent.load(directory, not no_verify, threads, device)
    check_kv_method(agent.engine.info, policy.method)
    asking = Asking(
        agent, policy, SamplingParameters(settings.max_new_tokens), parse_dialect(settings.dialect)
    )
    answered, problems = _ask_all(samples, asking, records, suite)
    problems = [*loaded.problems, *problems]
    if not answered:
        raise UsageError(_nothing_left(source.place, problems))
    summary = summarise(chosen, settings, answered, problems, loaded.notes, limit)
    if out:
        summary.write(out)
        note(f"records and reports are in {out}")
    if json:
        print(json_module.dumps(summary.to_json(), ensure_ascii=False))
    else:
        _print(summary)
    if summary.skipped:
        note(f"warning: samples skipped: {summary.skipped}; the figures are about the others")


def _tell(loaded: "Loaded") -> None:
    """Everything of the data set that can't be asked, on stderr."""
    for line in loaded.notes:
        note(f"warning: {line}")
    for problem in loaded.problems:
        _tell_problem(problem)


def _tell_problem(problem: "Problem") -> None:
    lost = "" if problem.samples == 1 else f" ({problem.samples} samples)"
    note(f"skipped{lost}: {problem}")


def _nothing_left(data: str, problems: Sequence["Problem"]) -> str:
    if not problems:
        return f"{data} holds no samples"
    lost = sum(problem.samples for problem in problems)
    return f"nothing of {data} could be asked; {lost} of {lost} samples were skipped, first {problems[0]}"


def _open(out: Path | None, settings: "Settings", samples: Sequence["Sample"]) -> "RecordFile[Record] | None":
    """The records of an earlier run with the same settings, as far as they are of use."""
    from starkv.evaluation.records import Record, RecordFile
    from starkv.evaluation.runner import finished_ids

    if out is None:
        note("without --out nothing is written: an interrupted run starts over")
        return None
    records = RecordFile(out, settings, Record)
    found = len(records.records)
    records.keep(finished_ids(samples, records.records))
    if found:
        done = sum(sample.id in records.records for sample in samples)
        note(f"going on with the records in {out}: {done} of {len(samples)} samples are answered")
    return records


def _ask_all(
    samples: Sequence["Sample"], asking: "Asking", records: "RecordFile[Record] | None", title: str
) -> tuple[list["Record"], list["Problem"]]:
    """Records of all samples in their order, asked now or earlier, and what could not be asked."""
    from starkv.evaluation.runner import ask

    answered = dict(records.records) if records else {}
    problems: list[Problem] = []
    remaining = [sample for sample in samples if sample.id not in answered]

    def skip(problem: "Problem") -> None:
        problems.append(problem)
        _tell_problem(problem)

    with progress() as stages:
        stages.start(title, len(remaining))
        for record in ask(remaining, asking, skip):
            answered[record.id] = record
            if records:
                records.add(record)
            stages.advance(record.id)
    return [answered[sample.id] for sample in samples if sample.id in answered], problems


def _print(summary: "Summary") -> None:
    """The figures on stdout, beside what others have published, and how they came about on stderr."""
    from starkv.evaluation.summary import PUBLISHED_HEADER, metric_table, published_row

    settings = summary.settings
    header, rows = metric_table(summary.metrics)
    table = Table(*header, box=None, header_style="dim", title_justify="left")
    table.title = f"{settings.suite}, {settings.engine}, {settings.kv.method} at {settings.kv.budget:.0%}"
    for row in rows:
        table.add_row(*row)
    results.print(table)
    if summary.published:
        beside = Table(*PUBLISHED_HEADER, box=None, header_style="dim")
        for figure in summary.published:
            beside.add_row(*published_row(figure))
        results.print(beside)
    note(summary.conditions())
