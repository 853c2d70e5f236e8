# SPDX-License-Identifier: Apache-2.0
"""``starkv export``: checkpoint → portable ONNX."""

from pathlib import Path
from typing import Annotated

import typer

from starkv.cli.console import note, progress
from starkv.cli.engines import made_parents
from starkv.cli.options import Model, Output, Quantization


def export(
    model: Model,
    out: Output = None,
    quant: Quantization = None,
    route: Annotated[
        str,
        typer.Option(
            help="build: written from the checkpoint, without torch. trace: traced from PyTorch, fp32."
        ),
    ] = "build",
) -> None:
    """Export a checkpoint to portable, quantized ONNX graphs.

    Example: [bold]starkv export gui-tiny --quant int4 --out exports/gui-tiny[/]
    """
    from starkv.export.cards import resolve_model
    from starkv.export.export_model import export_model
    from starkv.export.quantize.presets import load_preset
    from starkv.export.record import parse_route

    resolved = resolve_model(model)
    preset = load_preset(quant or resolved.card.quantization)
    target = out or Path("exports") / f"{resolved.card.name}-{preset.name}"
    note(f"{resolved.card.name}: licence of the weights is {resolved.card.licence}")
    with made_parents(target), progress() as stages:
        export_model(resolved.folder, resolved.card, target, preset, stages, parse_route(route))
    print(target)
