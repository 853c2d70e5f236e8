# SPDX-License-Identifier: Apache-2.0
"""``starkv export``: checkpoint → portable ONNX."""

from pathlib import Path
from typing import Annotated

import typer

from starkv.cli.console import progress
from starkv.cli.engines import made_parents
from starkv.cli.options import (
    Calibration,
    Checkpoint,
    Layers,
    Model,
    Output,
    Quantization,
    RandomDtype,
    RandomWeights,
)
from starkv.cli.sources import SourceOptions, find_source


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
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    random_dtype: RandomDtype = None,
    layers: Layers = None,
    calibration: Calibration = None,
) -> None:
    """Export a checkpoint to portable, quantized ONNX graphs.

    Example: [bold]starkv export gui-tiny --quant int4 --out exports/gui-tiny[/]

    Example: [bold]starkv export ui-tars-1.5-7b --random-weights --layers 2 --out exports/sizes[/]
    """
    from starkv.export.export_model import export_model
    from starkv.export.record import RECORD_NAME, parse_route
    from starkv.export.staging import check_replaceable

    chosen_route = parse_route(route)
    options = SourceOptions(checkpoint, random_weights, random_dtype, layers, calibration)
    source = find_source(model, quant, options)
    target = out or Path("exports") / f"{source.card.name}-{source.preset.name}"
    check_replaceable(target, RECORD_NAME)
    with made_parents(target), progress() as stages, source.checkpoint(target, stages) as folder:
        export_model(folder, source.card, target, source.preset, stages, chosen_route, source.calibration)
    print(target)
