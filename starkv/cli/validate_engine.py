# SPDX-License-Identifier: Apache-2.0
"""``starkv validate engine``: does an engine put out what a reference does, output by output?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from starkv.cli.console import errors, note, results
from starkv.cli.options import Json
from starkv.validation.report import Check, Report, markdown_table, write_text

if TYPE_CHECKING:
    from starkv.runtime.engines.base import EngineInfo

Against = Literal["ort", "torch"]
_MARKS = {"passed": "[green]passed[/]", "failed": "[bold red]failed[/]", "skipped": "[yellow]skipped[/]"}


def engine(
    directory: Annotated[Path, typer.Argument(help="Engine directory.")],
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Engine directory of ONNX Runtime for processors; the one of the same model and "
            "quantization by default.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Against,
        typer.Option(help="ort: that engine; torch: PyTorch, with that engine's embedding and vision tower."),
    ] = "ort",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="With --against torch: folder of the weights.", show_default=False),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Screens to ask about.", min=1)] = 4,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Also compare layer by layer, and name the first one that differs."),
    ] = False,
    save_polygraphy: Annotated[
        Path | None,
        typer.Option(help="Keep all outputs, for `polygraphy inspect data`.", show_default=False),
    ] = None,
    json: Json = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the report there: .json, or .md as a table.")
    ] = None,
) -> None:
    """Compare an engine with ONNX Runtime or PyTorch: image tokens, logits, cache, kept rows, replies.

    Both get the same screens, the same image tokens and the same reply. Exits with code 1 where they differ
    more than rounding explains.

    Example: [bold]starkv validate engine engines/gui-tiny-trt-int4[/]
    """
    from starkv.calibration.prompts import drawn_prompts
    from starkv.cli.engine_checks import bounds_for, layer_checks, output_checks
    from starkv.cli.engine_outputs import Case
    from starkv.cli.engine_reference import find_match, layer_contestants, output_contestants
    from starkv.cli.engine_runner import run_engines

    match = find_match(directory, reference, against, checkpoint)
    manifest = match.manifest
    # Every other prompt in two parts: how the second finds the rows of the first is code of its own.
    cases = [
        Case(prompt, in_parts=bool(number % 2))
        for number, prompt in enumerate(drawn_prompts(prompts, manifest.image.max_pixels))
    ]
    infos: list[EngineInfo] = []
    contestants = output_contestants(match, cases, infos.append)
    in_layers = layer_contestants(match, cases) if layers else []
    blank = Check("engine", manifest.backend, "", "passed", match.reference_name, manifest.compute_dtype)
    with errors.status(f"{prompts} prompts"):
        expected, actual, *others = run_engines(contestants, prompts, save_polygraphy)
        bounds = bounds_for(match, expected, others[0] if others else None)
        checks = [*output_checks(expected, actual, bounds, blank)]
    if in_layers:
        with errors.status("layers"):
            expected, actual, *others = run_engines(in_layers, prompts)
            bounds = bounds_for(match, expected, others[0] if others else None)
            checks += layer_checks(expected, actual, bounds, blank)
    report = Report.of("validate engine", checks, infos[0].device)
    _write(report, out)
    if json:
        print(report.to_json())
    else:
        results.print(_table(report))
        counts = ", ".join(f"{report.count(status)} {status}" for status in ("passed", "failed", "skipped"))
        note(f"{directory} against {match.reference_name}: {counts}")
    if not report.passed:
        raise typer.Exit(1)


_HEADER = ("", "output", "largest / bound", "total / bound", "typical / bound", "same / bound", "")


def _rows(report: Report) -> Sequence[tuple[str, ...]]:
    """Cells of each check: what was measured, and behind it the bound."""

    def show(check: Check, name: str, form: str) -> str:
        measured = (check.measures.get(key) for key in (name, f"tolerance_{name}"))
        return " / ".join(f"{value:{form}}" for value in measured if value is not None)

    return [
        (
            check.status,
            check.case,
            *(show(check, name, ".2g") for name in ("error", "total_error", "typical_error")),
            show(check, "kept_agreement", ".1%"),
            check.reason,
        )
        for check in report.checks
    ]


def _table(report: Report) -> Table:
    table = Table(*_HEADER, box=None, header_style="dim")
    for status, *cells in _rows(report):
        table.add_row(_MARKS[status], *cells)
    return table


def _write(report: Report, out: Path | None) -> None:
    if out is None:
        return
    if out.suffix == ".md":
        title = f"# {report.command}, {report.device}, {report.date}\n\n"
        write_text(out, title + markdown_table(_HEADER, _rows(report)) + "\n")
    else:
        report.write(out)
