# SPDX-License-Identifier: Apache-2.0
"""``starkv train-kv``: a model → low-rank factors of its KV cache, trained on GUI prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starkv.cli.console import note, progress
from starkv.cli.kv import packing_options
from starkv.cli.options import Checkpoint, Model
from starkv.errors import UsageError

if TYPE_CHECKING:
    from starkv.cli.console import StageProgress
    from starkv.kv_training.options import TrainingOptions


def train_kv(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="File for the factors, such as gui-tiny.factors.")],
    kv_rank: Annotated[
        float, typer.Option("--kv-rank", help="Share of the cache's channels that latents have.")
    ] = 0.5,
    kv_quant: Annotated[
        str,
        typer.Option(
            "--kv-quant", help="What latents are stored as, which training gets used to: none, int8 or int4."
        ),
    ] = "none",
    steps: Annotated[int, typer.Option(help="Steps of both phases.")] = 1200,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    prompts: Annotated[int, typer.Option(help="Most prompts to train on; all stay in memory.", min=1)] = 400,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="Folder with prompts.jsonl and its images. Drawn screens by default.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    engine: Annotated[
        Path | None,
        typer.Option(
            "--engine",
            help="Exact engine of the model, for its vision tower and statistics; made with fp32 weights by "
            "default.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Of the decoder in PyTorch: cpu, or cuda, where it computes in bfloat16.")
    ] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. PyTorch's choice by default.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of prompts.", min=0)] = 0,
) -> None:
    """Train low-rank KV factors by distillation from the model itself; give them to `pack --factors`.

    The model's weights stay as they are. A first phase chooses ranks within the budget of bytes, a second
    one trains what is left of the factors. A run that was interrupted goes on when it is repeated. Minutes
    for the embedded model; a model of 7B needs a GPU of 24 GB.

    Example: [bold]starkv train-kv gui-tiny --kv-rank 0.5 --out gui-tiny-r50.factors[/]
    """
    # Whoever lacks it should not wait for an engine first.
    try:
        import torch
    except ModuleNotFoundError:
        raise UsageError(
            "train-kv trains in PyTorch, which is missing; pip install 'starkv[cpu,export,train]'"
        ) from None
    from starkv.kv_training.options import TrainingOptions

    wanted = packing_options(kv_quant, kv_rank)
    assert wanted is not None
    options = TrainingOptions(wanted, steps, batch, seed=seed)
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}; known: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no CUDA device here; leave --device out to train on the processor")
    if out.is_dir():
        raise UsageError(f"{out} is a directory; --out is the file that the factors are written to")
    if threads:
        torch.set_num_threads(threads)
    from starkv.cli.engines import made_parents

    with made_parents(out), progress() as stages:
        size, budget = _train(model, out, options, prompts, calibration, checkpoint, engine, device, stages)
    note(f"{size:,} bytes of latents per token over all layers (budget {budget:,})")
    print(out)


def _train(
    model: str,
    out: Path,
    options: "TrainingOptions",
    count: int,
    calibration: Path | None,
    checkpoint: Path | None,
    engine: Path | None,
    device: str,
    stages: "StageProgress",
) -> tuple[int, int]:
    """Returns bytes per token, and those that were allowed."""
    import torch

    from starkv.calibration.kv_packing import RECENT_ROWS, layer_factors
    from starkv.calibration.kv_prompts import kv_prompts
    from starkv.calibration.kv_statistics import gather_statistics
    from starkv.calibration.prompts import read_prompts
    from starkv.cli.licence import note_licence
    from starkv.export.build.pack import attention_weights
    from starkv.export.cards import resolve_model
    from starkv.kv_packing.file import save_packing
    from starkv.kv_training.sequences import digest, lay_out, training_prompts
    from starkv.kv_training.soft import SoftFactors
    from starkv.kv_training.start import first_factors
    from starkv.kv_training.state import StateFile
    from starkv.kv_training.training import Training
    from starkv.runtime.engines.ort import OrtEngine
    from starkv.runtime.engines.torch_weights import load_decoder
    from starkv.runtime.preprocess.tokenizer import ChatTokenizer

    resolved = resolve_model(model, checkpoint)
    note_licence(resolved.card)
    directory = engine or _exact_engine(model, resolved.card.name, checkpoint)
    weights = attention_weights(directory)
    opened, tokenizer = OrtEngine(directory), ChatTokenizer.from_directory(directory)
    manifest = opened.manifest
    given = read_prompts(calibration) if calibration else []
    asked = list(training_prompts(manifest.name, given, count, manifest.image.max_pixels))
    sequences = lay_out(opened, tokenizer, asked, stages)
    state = StateFile(out.with_name(f"{out.name}.training"), f"{options} {manifest.name} {digest(sequences)}")
    # In 16 bits thresholds would stall, but those and the factors are float32 whatever the model is.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    decoder = load_decoder(resolved.folder, manifest.text, dtype, device)
    sequences = [sequence.to(device) for sequence in sequences]

    def first() -> SoftFactors:
        seen = kv_prompts(manifest.name, manifest.image.max_pixels, calibration)
        statistics = gather_statistics(opened, tokenizer, weights.biases, seen, progress=stages)
        layers = layer_factors(statistics, weights.biases, weights.outputs)
        return first_factors(decoder, layers, sequences, RECENT_ROWS, options.seed, device, stages)

    trained = Training(decoder, sequences, options, RECENT_ROWS, first, state, stages, device).run()
    save_packing(trained.factors.packing(weights.biases, RECENT_ROWS), out)
    state.remove()
    return trained.factors.row_bytes, trained.budget


def _exact_engine(model: str, name: str, checkpoint: Path | None) -> Path:
    """The model's engine with fp32 weights, made where it is missing."""
    from starkv.cli.engines import build_engine, engine_directory
    from starkv.cli.sources import SourceOptions
    from starkv.manifest import MANIFEST_NAME

    directory = engine_directory(name, "ort", "fp32")
    if (directory / MANIFEST_NAME).is_file():
        return directory
    note(f"no engine at {directory} yet: building it once")
    return build_engine(model, "fp32", None, options=SourceOptions(checkpoint))[0]
