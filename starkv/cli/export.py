# SPDX-License-Identifier: Apache-2.0
"""``starkv export``: checkpoint → portable ONNX."""

from pathlib import Path
from typing import Annotated

import typer

from starkv.cli.console import progress
from starkv.cli.engines import calibration_for, made_parents
from starkv.cli.licence import note_licence
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
from starkv.errors import UsageError


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
    from starkv.cli.random_weights import card_for_random_weights, random_checkpoint
    from starkv.export.cards import resolve_model
    from starkv.export.export_model import export_model
    from starkv.export.quantize.presets import load_preset
    from starkv.export.record import RECORD_NAME, parse_route
    from starkv.export.staging import check_replaceable

    chosen_route = parse_route(route)
    if random_weights:
        card, config = card_for_random_weights(model)
        preset = load_preset(quant or card.quantization)
        target = out or Path("exports") / f"{card.name}-{preset.name}"
        check_replaceable(target, RECORD_NAME)
        prompts = calibration_for(preset, card, calibration)
        with (
            made_parents(target),
            progress() as stages,
            random_checkpoint(card, config, target, checkpoint, random_dtype, layers, stages) as folder,
        ):
            export_model(folder, card, target, preset, stages, chosen_route, prompts)
    else:
        if random_dtype is not None or layers is not None:
            raise UsageError("--random-dtype and --layers are about random weights; add --random-weights")
        resolved = resolve_model(model, checkpoint)
        preset = load_preset(quant or resolved.card.quantization)
        target = out or Path("exports") / f"{resolved.card.name}-{preset.name}"
        note_licence(resolved.card)
        prompts = calibration_for(preset, resolved.card, calibration)
        with made_parents(target), progress() as stages:
            export_model(resolved.folder, resolved.card, target, preset, stages, chosen_route, prompts)
    print(target)
