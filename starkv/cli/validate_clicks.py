# SPDX-License-Identifier: Apache-2.0
"""``starkv validate clicks``: where does an engine click, and what do quantization and compression change?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from starkv.cli.console import note, results
from starkv.cli.options import Device, Engine, Json, Threads
from starkv.errors import UsageError
from starkv.validation.report import Report, write_text

if TYPE_CHECKING:
    from starkv.cli.click_report import Document
    from starkv.evaluation.samples import Problem

ClickTask = Literal["click", "trajectory", "both"]
REASON = "why"
"""Header of the last column, where a check says why it failed or was skipped."""
_DEFAULT_BUDGETS = (0.2, 0.4, 0.8)
_REPORT_ONLY = (
    *("bound", REASON, "compared", "reference", "same clicks", "off by, px"),
    *("against full", "KL p95", "bytes"),
)
_SHORT = {"same replies": "same", "compress, ms": "ms", "decode, ms": "ms"}
_FEW = 6
"""Columns of a table that has room for intervals."""
_STYLES = {"passed": "[green]passed[/]", "failed": "[bold red]failed[/]", "skipped": "[yellow]skipped[/]"}


def clicks(
    engine: Engine,
    task: Annotated[
        ClickTask, typer.Option(help="Single clicks, trajectories of screenshots, or both.")
    ] = "both",
    n: Annotated[int, typer.Option("--n", help="Questions of each task.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Of the questions.", min=0)] = 0,
    kv_budget: Annotated[
        list[str] | None,
        typer.Option(
            "--kv-budget",
            help="Share of the prompt's rows to keep; may be repeated, or be a list such as 0.2,0.4. "
            "[0.2,0.4,0.8]",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Engine in fp32 of the same model; found by name, or built for a small model, by default.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the weights, for PyTorch. Looked for on this machine by default.",
            show_default=False,
        ),
    ] = None,
    kv_combinations: Annotated[
        bool,
        typer.Option(
            "--kv-combinations",
            help="Also pack the engine, in a temporary folder, and compare eviction (the first budget), "
            "quantized rows and low rank, alone and together. An engine with a packed cache is compared "
            "anyway.",
        ),
    ] = False,
    kv_quant: Annotated[
        str | None,
        typer.Option("--kv-quant", help="Of --kv-combinations: int8 or int4. [int8]", show_default=False),
    ] = None,
    kv_rank: Annotated[
        float | None,
        typer.Option(
            "--kv-rank", help="Of --kv-combinations: share of the channels. [0.5]", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.", min=1)] = 128,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the report; ENGINE.clicks beside the engine by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare an engine's clicks with PyTorch's, with fp32's, and with those of smaller KV caches.

    Also how fast it is, in how much memory. Questions have known answers. Exits with code 1 where
    clicks are lost that should not be.

    Example: [bold]starkv validate clicks --engine gui-tiny --n 200[/]
    """
    from starkv.cli.click_checks import cells, checks_of
    from starkv.cli.click_engines import check_reference, float_rival, torch_rival
    from starkv.cli.click_page import html_page
    from starkv.cli.click_pictures import pictures
    from starkv.cli.click_report import document
    from starkv.cli.click_runs import ClickRuns
    from starkv.cli.click_samples import click_samples
    from starkv.cli.engines import find_engine
    from starkv.cli.kv_combination_checks import combination_checks
    from starkv.cli.kv_combination_runs import CombinationRuns
    from starkv.cli.kv_combinations import plan_combinations
    from starkv.evaluation.suites.synthetic import TASKS
    from starkv.kv_packing.options import parse_kv_quant
    from starkv.manifest import read_manifest
    from starkv.methods.names import FULL

    budgets = _budgets(kv_budget)
    asked_cells = cells(budgets)
    directory = find_engine(engine, device=device)
    manifest = read_manifest(directory)
    if reference:
        check_reference(reference, directory, manifest)
    quant = None if kv_quant is None else parse_kv_quant(kv_quant)
    plan = plan_combinations(directory, manifest, kv_combinations, quant, kv_rank, budgets[0])
    folder = out or directory.absolute().with_name(f"{directory.absolute().name}.clicks")
    # Refused before the work of minutes.
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [one for one in TASKS if task in (one, "both")]
    questions = {one: click_samples(manifest, one, n, seed) for one in chosen}
    runs = ClickRuns(questions, asked_cells, max_new_tokens, _tell)
    tested = runs.tested(directory, threads, device)
    if not all(by_cell[FULL] for by_cell in tested.answers.values()):
        raise UsageError(f"no question could be asked; first {runs.problems[0]}")
    # Found only now: what may have to be built for it must not count as the engine's memory.
    rivals = (torch_rival(directory, manifest, checkpoint), float_rival(directory, manifest, reference))
    answers = runs.with_rivals(tested, rivals)
    checks = [check for run in answers for check in checks_of(run, asked_cells, manifest)]
    if plan:
        combined = CombinationRuns(questions, plan, max_new_tokens, threads).ask(directory, folder)
        for one, by_name in combined.items():
            checks += combination_checks(one, by_name, plan, manifest)
    report = Report.of("validate clicks", checks, tested.device)
    shown = {str(run.task): list(pictures(questions[run.task], run.answers[FULL])) for run in answers}
    laid_out = document(report, manifest, seed, sum(problem.samples for problem in runs.problems))
    report.write(folder / "report.json")
    write_text(folder / "report.md", laid_out.markdown())
    write_text(folder / "report.html", html_page(laid_out, shown))
    if json:
        print(report.to_json())
    else:
        _print(laid_out)
    counts = ", ".join(f"{report.count(status)} {status}" for status in ("passed", "failed", "skipped"))
    note(f"{directory}: {counts}; the report is {folder / 'report.html'}")
    if not report.passed:
        raise typer.Exit(1)


def _budgets(given: Sequence[str] | None) -> list[float]:
    """Budgets of repeated options and of lists, in order.

    Raises:
        UsageError: one is no number.
    """
    words = [word for option in given or () for word in option.split(",")]
    try:
        return [float(word) for word in words] or list(_DEFAULT_BUDGETS)
    except ValueError:
        raise UsageError(
            f"--kv-budget {','.join(words)}: give numbers over 0 and up to 1, such as 0.2,0.4"
        ) from None


def _tell(problem: "Problem") -> None:
    note(f"skipped: {problem}")


def _print(document: "Document") -> None:
    """The tables on stdout, without the columns that the report explains them by."""
    for section in document.sections:
        shown = [index for index, name in enumerate(section.header) if name not in _REPORT_ONLY]
        table = Table(
            box=None, header_style="dim", title=section.title, title_justify="left", padding=(0, 1, 0, 0)
        )
        for index in shown:
            name = section.header[index]
            table.add_column(_SHORT.get(name, name), no_wrap=True)
        for row in section.rows:
            # Intervals fit into 80 columns where there are few of them; the report has them all.
            brief = [row[index] if len(shown) <= _FEW else row[index].partition(" [")[0] for index in shown]
            status, *cells = brief
            # Of the case only the task: the number of questions is the same in all rows.
            table.add_row(_STYLES[status], cells[0].partition(",")[0], *cells[1:])
        results.print(table)
        for row in section.rows:
            if section.header[-1] == REASON and row[-1]:
                note(f"{row[0]}: {section.title}, {row[1]}, {row[2]}: {row[-1]}")
    for line in document.notes:
        note(line)
