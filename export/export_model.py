# SPDX-License-Identifier: Apache-2.0
"""Checkpoint → portable ONNX graphs with (quantized) weights, and everything an engine is built from."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

import starkv
from starkv.errors import UsageError
from starkv.export.cards import ModelCard
from starkv.export.checkpoint import Checkpoint
from starkv.export.compress import write_compress_graphs
from starkv.export.embedding import write_embedding
from starkv.export.graph import GraphBuilder
from starkv.export.models.config import ModelConfig
from starkv.export.models.qwen2_5_vl_decoder import EMBEDDING, HEAD, build_decoder
from starkv.export.progress import NoProgress, Progress
from starkv.export.quantize.presets import Preset
from starkv.export.record import RECORD_NAME, SCHEMA_VERSION, ExportRecord, Route, write_record
from starkv.export.side_files import copy_side_files, image_limits, special_tokens
from starkv.export.staging import staged_directory
from starkv.export.weights import DataFile, WeightWriter, move_weights

VISION = "vision"
DECODER = "decoder"
"""Each graph is ``{name}.onnx`` with its weights in ``{name}.data``."""

_STORED_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def export_model(
    folder: Path,
    card: ModelCard,
    out: Path,
    preset: Preset,
    progress: Progress | None = None,
    route: Route = "build",
) -> ExportRecord:
    """Export the checkpoint in ``folder`` into the directory ``out``.

    ``out`` appears complete or not at all; an earlier export there is replaced. The same input gives the same
    bytes. Memory holds one chunk of one weight at a time (``route="trace"``: the whole model).

    Raises:
        CheckpointError: the checkpoint is missing, damaged or not supported.
        UsageError: ``out`` holds something else, or the preset doesn't fit the model or the route.
    """
    progress = progress or NoProgress()
    with Checkpoint(folder) as checkpoint:
        config = checkpoint.family.parse_config(checkpoint.config, folder / "config.json")
        with staged_directory(out, RECORD_NAME) as staging:
            copy_side_files(folder, staging)
            _export_vision(checkpoint, config, staging, preset, progress)
            if route == "trace":
                _trace_decoder(folder, config, card, staging, preset, progress)
            else:
                _export_decoder(checkpoint, config, card, staging, preset, progress)
            write_compress_graphs(staging, config.text)
            progress.start("embedding", 1)
            write_embedding(checkpoint, f"{EMBEDDING}.weight", staging)
            progress.advance(EMBEDDING)
            record = _describe(checkpoint, config, card, staging, preset, route)
            write_record(staging, record)
    return record


def _export_vision(
    checkpoint: Checkpoint, config: ModelConfig, directory: Path, preset: Preset, progress: Progress
) -> None:
    progress.start(VISION, sum(name.startswith("model.visual.") for name in checkpoint.names()))
    graph = _graph_builder(checkpoint, VISION, directory, preset, progress)
    checkpoint.family.build_vision(graph, config)
    ir.save(graph.model(), directory / f"{VISION}.onnx")


def _export_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    card: ModelCard,
    directory: Path,
    preset: Preset,
    progress: Progress,
) -> None:
    # A tied embedding is also the head; any other stays outside the graph.
    head, unused = (EMBEDDING, HEAD) if config.text.tied_embedding else (HEAD, EMBEDDING)
    outside = ("model.visual.", f"{unused}.")
    progress.start(DECODER, sum(not name.startswith(outside) for name in checkpoint.names()))
    graph = _graph_builder(checkpoint, DECODER, directory, preset, progress)
    build_decoder(graph, config, card.observation_window, head, preset.head)
    ir.save(graph.model(), directory / f"{DECODER}.onnx")


def _graph_builder(
    checkpoint: Checkpoint, name: str, directory: Path, preset: Preset, progress: Progress
) -> GraphBuilder:
    data = DataFile(directory / f"{name}.data")
    weights = WeightWriter(checkpoint, data, progress, preset.block_size)
    return GraphBuilder(name, weights, preset.vision if name == VISION else preset.decoder)


def _trace_decoder(
    folder: Path, config: ModelConfig, card: ModelCard, directory: Path, preset: Preset, progress: Progress
) -> None:
    if preset.name != "fp32":
        raise UsageError(
            f"the trace route exports fp32 only, not {preset.name}; use the build route or --quant fp32"
        )
    # The only module that needs torch and transformers.
    from starkv.export.trace import trace_decoder

    progress.start(DECODER, 1)
    model = trace_decoder(folder, config, card.observation_window)
    move_weights(model, DataFile(directory / f"{DECODER}.data"))
    ir.save(model, directory / f"{DECODER}.onnx")
    progress.advance(DECODER)


def _describe(
    checkpoint: Checkpoint,
    config: ModelConfig,
    card: ModelCard,
    directory: Path,
    preset: Preset,
    route: Route,
) -> ExportRecord:
    embedding = _STORED_NAMES[checkpoint.stored_dtype(f"{EMBEDDING}.weight")]
    return ExportRecord(
        schema_version=SCHEMA_VERSION,
        name=card.name,
        family=checkpoint.family.name,
        licence=card.licence,
        source=checkpoint.folder.resolve().name,
        route=route,
        coordinates=card.coordinates,
        prompt=card.prompt,
        text=config.text,
        vision=config.vision,
        tokens=special_tokens(checkpoint.folder, checkpoint.config),
        image=image_limits(checkpoint.folder, card.min_pixels, card.max_pixels),
        quantization=preset.describe(embedding),
        observation_window=card.observation_window,
        max_context=card.max_context,
        kv_budget=card.kv_budget,
        parameters=checkpoint.parameters,
        tool_versions={
            "starkv": starkv.__version__,
            "onnx": onnx.__version__,
            "onnx_ir": ir.__version__,
            "numpy": np.__version__,
        },
        files=sorted(path.name for path in directory.iterdir()),
    )
