# SPDX-License-Identifier: Apache-2.0
"""``starkv validate``: does what runs here agree with what it should be?"""

from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from starkv.cli.console import errors, note, results
from starkv.cli.options import Json
from starkv.cli.validate_clicks import clicks
from starkv.cli.validate_engine import engine
from starkv.cli.validate_quant import quant
from starkv.validation.report import Check, Report

app = typer.Typer(no_args_is_help=True)
app.command()(quant)
app.command()(engine)
app.command()(clicks)

Device = Literal["auto", "cpu", "cuda"]
_MARKS = {"passed": "[green]passed[/]", "failed": "[bold red]failed[/]", "skipped": "[yellow]skipped[/]"}
_COLUMNS = ("", "dtype", "implementation", "error", "same rows", "time", "PyTorch", "")


@app.callback()
def validate() -> None:
    """Compare implementations, and say where they differ."""


@app.command()
def ops(
    device: Annotated[
        Device,
        typer.Option(help="Where to run. On cpu, GPU implementations are emulated on small cases."),
    ] = "auto",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, float16 or bfloat16; may be repeated. All if not given."),
    ] = None,
    json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Also write the report there, as JSON.")] = None,
) -> None:
    """Compare every implementation of the operators with the PyTorch reference.

    Compress, KVAttention, QuantizedKVAttention, PackableKVAttention and FullAttention in ONNX Runtime,
    Triton, CUDA and the TensorRT plugins, as far as this machine can run them; the table says why not the
    rest. Exits with code 1 where something differs.
    """
    import torch

    from starkv.errors import UsageError
    from starkv.validation.ops import DTYPES, validate_ops

    unknown = set(dtype or ()) - set(DTYPES)
    if unknown:
        raise UsageError(f"--dtype {sorted(unknown)[0]}: must be one of {', '.join(DTYPES)}")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and found == "cpu":
        raise UsageError("--device cuda: PyTorch finds no GPU here; --device cpu emulates on small cases")
    place = torch.device(found if device == "auto" else device)
    with errors.status("") as status:
        wanted = tuple(dtype) if dtype else tuple(DTYPES)
        checks = list(validate_ops(place, wanted, lambda work: status.update(work)))
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else None
    report = Report.of("validate ops", checks, name)
    if out:
        report.write(out)
    if json:
        print(report.to_json())
    else:
        print_report(report)
    if not report.passed:
        raise typer.Exit(1)


def print_report(report: Report) -> None:
    """A table for each case on stdout, a summary on stderr."""
    for (subject, case), checks in groupby(report.checks, lambda check: (check.subject, check.case)):
        table = Table(
            *_COLUMNS, box=None, header_style="dim", title=f"{subject}: {case}", title_justify="left"
        )
        for check in checks:
            table.add_row(_MARKS[check.status], *_cells(check))
        results.print(table)
    counts = ", ".join(f"{report.count(status)} {status}" for status in ("passed", "failed", "skipped"))
    note(f"{report.device}: {counts}")


def _cells(check: Check) -> tuple[str, ...]:
    measures = check.measures

    def show(name: str, form: str, scale: float = 1.0, unit: str = "") -> str:
        return format(scale * measures[name], form) + unit if name in measures else ""

    return (
        check.dtype,
        check.implementation,
        show("error", ".1e"),
        show("kept_agreement", ".2%"),
        show("seconds", ",.3f", 1e3, " ms"),
        show("reference_seconds", ",.3f", 1e3, " ms"),
        check.reason,
    )
