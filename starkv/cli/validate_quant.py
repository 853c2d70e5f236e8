# SPDX-License-Identifier: Apache-2.0
"""``starkv validate quant``: what each quantization changes about a model's replies and clicks."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from starkv.cli.console import errors, note, results
from starkv.cli.options import Json, Model
from starkv.errors import UsageError
from starkv.validation.report import Check, Report

_MARKS = {"passed": "[green]passed[/]", "failed": "[bold red]failed[/]", "skipped": "[yellow]skipped[/]"}
_COLUMNS = ("", "quant", "MiB", "bits", "KL", "KL 99%", "token", "click", "moved", "right")
_DEFAULT = ("int8", "int4", "int4-awq", "int4-small")
_MEBIBYTE = 1 << 20


def quant(
    model: Model,
    quant: Annotated[
        list[str] | None,
        typer.Option(
            "--quant",
            help=f"Quantization to judge; may be repeated. {', '.join(_DEFAULT)} if not given.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str, typer.Option(help="Quantization to compare with: fp32, or int8 where fp32 does not fit.")
    ] = "fp32",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Folder with prompts.jsonl and its images. Held-out screens by default.", show_default=False
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Held-out screens to ask about.", min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.", min=1)] = 96,
    json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Also write the report there, as JSON.")] = None,
) -> None:
    """Compare quantized engines of a model with its fp32 engine.

    Size, divergence of every token's distribution while all engines read the same reply, and where each
    engine clicks by itself. Engines that exist are measured as they are, missing ones are built. Exits with
    code 1 where a quantization loses too much.
    """
    from starkv.calibration.held_out import held_out_prompts
    from starkv.calibration.prompts import read_prompts
    from starkv.cli.quant_engines import answers_of, reference_answers
    from starkv.export.cards import resolve_model
    from starkv.export.quantize.presets import load_preset
    from starkv.validation.quant import judge, measure

    presets = [load_preset(name) for name in quant or _DEFAULT]
    load_preset(reference)
    if any(preset.name == reference for preset in presets):
        raise UsageError(f"--quant {reference} would be compared with itself; choose another --reference")
    resolved = resolve_model(model)
    asked = read_prompts(prompts) if prompts else held_out_prompts(resolved, count)
    case = f"{len(asked)} prompts, {prompts or 'held-out screens'}"
    directories = {
        name: _engine(model, resolved.card.name, name)
        for name in (reference, *(preset.name for preset in presets))
    }
    checks = []
    with errors.status("") as status:

        def show(name: str, done: int) -> None:
            status.update(f"{name}: {done} of {len(asked)} prompts")

        done = partial(show, reference)
        with reference_answers(directories[reference], asked, max_new_tokens, done) as expected:
            for preset in presets:
                directory = directories[preset.name]
                done = partial(show, preset.name)
                answers = answers_of(directory, asked, expected, max_new_tokens, done)
                measures = measure(expected.answers, answers) | _sizes(directory)
                check = Check("quantization", preset.name, case, "passed", reference, preset.decoder)
                checks.append(judge(check, measures))
    report = Report.of("validate quant", checks)
    if out:
        report.write(out)
    if json:
        print(report.to_json())
    else:
        print_quant(report, resolved.card.name)
    if not report.passed:
        raise typer.Exit(1)


def _engine(model: str, name: str, quantization: str) -> Path:
    """The engine of one quantization, built if it is missing."""
    from starkv.cli.engines import build_engine, engine_directory
    from starkv.manifest import MANIFEST_NAME

    directory = engine_directory(name, "ort", quantization)
    if (directory / MANIFEST_NAME).is_file():
        note(f"{quantization}: {directory}")
        return directory
    return build_engine(model, quantization, None)[0]


def _sizes(directory: Path) -> dict[str, float]:
    """Bytes of all files, and how many bits of weight data come on one parameter of the checkpoint."""
    from starkv.manifest import read_manifest

    size = {path.name: path.stat().st_size for path in directory.iterdir()}
    weights = sum(size.get(name, 0) for name in ("vision.data", "decoder.data", "embedding.safetensors"))
    return {
        "bytes": float(sum(size.values())),
        "bits_per_weight": 8 * weights / read_manifest(directory).parameters,
    }


def print_quant(report: Report, model: str) -> None:
    """One line for each quantization on stdout, a summary on stderr."""
    first = report.checks[0]
    title = f"{model} against {first.reference}: {first.case}"
    if "reference_clicks_right" in first.measures:
        title += f", {first.measures['reference_clicks_right']:.1%} of its clicks right"
    # Fits into 80 columns: figures that are cut off would say nothing.
    table = Table(box=None, header_style="dim", title=title, title_justify="left", padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, no_wrap=True)
    for check in report.checks:
        table.add_row(_MARKS[check.status], *_cells(check))
    results.print(table)
    for check in report.checks:
        if check.reason:
            note(f"{check.implementation}: {check.reason}")
    note(f"{report.device}: {report.count('passed')} passed, {report.count('failed')} failed")


def _cells(check: Check) -> tuple[str, ...]:
    measures = check.measures

    def show(name: str, form: str, unit: str = "") -> str:
        return format(measures[name], form) + unit if name in measures else ""

    return (
        check.implementation,
        f"{measures['bytes'] / _MEBIBYTE:,.1f}",
        show("bits_per_weight", ".2f"),
        show("kl_mean", ".5f"),
        show("kl_p99", ".4f"),
        show("top1_agreement", ".2%"),
        show("same_clicks", ".1%"),
        show("click_distance", ".2f", " px"),
        show("clicks_right", ".1%"),
    )
