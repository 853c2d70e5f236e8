# SPDX-License-Identifier: Apache-2.0
"""``starkv validate engine``: does an engine put out what a reference does, output by output?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from starkv.cli.console import errors, note, results
from starkv.cli.options import Json
from starkv.validation.report import Check, Report, markdown_table, write_text

Against = Literal["ort", "torch"]
_BUDGET, _NEW_TOKENS = 0.5, 16
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
        Against, typer.Option(help="ort: that engine; torch: PyTorch, with its embedding and vision tower.")
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
    from starkv.cli.engine_checks import compare_layers, find_reference, open_reference, output_checks
    from starkv.cli.engine_outputs import Case, outputs_of
    from starkv.cli.engine_runner import compare_engines
    from starkv.cli.engine_tolerances import tolerances
    from starkv.manifest import read_manifest
    from starkv.runtime.engines.opening import open_engine
    from starkv.runtime.preprocess.tokenizer import ChatTokenizer

    manifest = read_manifest(directory)
    chosen = find_reference(directory, manifest, reference, against, checkpoint)
    bounds = tolerances(
        manifest.compute_dtype,
        manifest.quantization,
        None if chosen.checkpoint else read_manifest(chosen.directory).quantization,
        manifest.text.layers,
    )
    tested = open_engine(directory)
    cases = [
        Case(prompt, _BUDGET, _NEW_TOKENS) for prompt in drawn_prompts(prompts, manifest.image.max_pixels)
    ]
    tokenizer = ChatTokenizer.from_directory(directory)
    expected = open_reference(chosen)
    with errors.status(f"{prompts} prompts"):
        comparison = compare_engines(
            (chosen.name, lambda case: outputs_of(expected, tokenizer, cases[case])),
            (tested.info.backend, lambda case: outputs_of(tested, tokenizer, cases[case])),
            len(cases),
            bounds.of,
            save_polygraphy,
        )
    blank = Check("engine", tested.info.backend, "", "passed", chosen.name, manifest.compute_dtype)
    checks = list(output_checks(comparison, bounds, blank))
    if layers:
        checks += compare_layers(tested, directory, chosen, cases[0], bounds, blank)
    report = Report.of("validate engine", checks, tested.info.device)
    _write(report, out)
    if json:
        print(report.to_json())
    else:
        results.print(_table(report))
        counts = ", ".join(f"{report.count(status)} {status}" for status in ("passed", "failed", "skipped"))
        note(f"{directory} against {chosen.name}: {counts}")
    if not report.passed:
        raise typer.Exit(1)


def _rows(report: Report) -> Sequence[tuple[str, ...]]:
    def show(check: Check) -> tuple[str, ...]:
        measures = check.measures
        error = f"{measures['error']:.1e}" if "error" in measures else ""
        share = f"{measures['kept_agreement']:.1%}" if "kept_agreement" in measures else ""
        bound = measures.get("tolerance")
        limit = "" if bound is None else f"{bound:.1e}" if error else f"{bound:.1%}"
        return check.case, error, share, limit, check.reason

    return [(check.status, *show(check)) for check in report.checks]


_HEADER = ("", "output", "error", "same", "bound", "")


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
