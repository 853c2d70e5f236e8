# SPDX-License-Identifier: Apache-2.0
"""``starkv build``: portable ONNX, or a model, → engine directory."""

from pathlib import Path
from typing import Annotated

import typer

from starkv.cli.console import note, progress
from starkv.cli.engines import (
    build_engine,
    choose_backend,
    engine_directory,
    made_parents,
    settle_dtype,
)
from starkv.cli.options import (
    Calibration,
    Checkpoint,
    Layers,
    Output,
    Quantization,
    RandomDtype,
    RandomWeights,
)
from starkv.cli.sources import SourceOptions
from starkv.errors import UsageError


def build(
    model: Annotated[
        str, typer.Argument(help="Model card's name, Hugging Face folder, or a folder of `export`.")
    ],
    out: Output = None,
    quant: Quantization = None,
    backend: Annotated[str, typer.Option(help="auto, ort or trt.")] = "auto",
    prepack: Annotated[
        bool,
        typer.Option(
            "--prepack", help="Also store the graphs compiled for this processor: loads faster here."
        ),
    ] = False,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    random_dtype: RandomDtype = None,
    layers: Layers = None,
    calibration: Calibration = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for an NVIDIA GPU.")] = "cpu",
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            help="With --device cuda: bfloat16 or float16, in which Qwen2.5-VL may overflow. [bfloat16]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Build an engine directory that `run`, `bench` and other machines can load.

    Example: [bold]starkv build gui-tiny --quant int4[/]

    Example: [bold]starkv build ui-tars-1.5-7b --random-weights[/] to see what the real size costs here
    """
    from starkv.export.build.ort import build_ort_engine
    from starkv.export.record import RECORD_NAME, read_record

    options = SourceOptions(checkpoint, random_weights, random_dtype, layers, calibration)
    chosen, reason = choose_backend(backend)
    dtype = settle_dtype(device, compute_dtype)
    note(f"backend {chosen}: {reason}")
    if (Path(model) / RECORD_NAME).is_file():
        if options != SourceOptions():
            raise UsageError(
                f"{model} is exported already; --checkpoint, --random-weights and --calibration come earlier"
            )
        record = read_record(Path(model))
        if quant not in (None, record.quantization.preset):
            raise UsageError(
                f"{model} was exported as {record.quantization.preset}, not {quant}; "
                "leave --quant out, or export again"
            )
        target = out or engine_directory(record.name, chosen, record.quantization.preset, device)
        with made_parents(target), progress() as stages:
            build_ort_engine(Path(model), target, stages, prepack, compute_dtype=dtype)
    else:
        target, _ = build_engine(model, quant, out, prepack, options, dtype)
    print(target)
