# SPDX-License-Identifier: Apache-2.0
"""Checkpoint → portable ONNX graphs with (quantized) weights, and everything an engine is built from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

import starkv
from starkv.errors import UsageError
from starkv.export.cards import ModelCard
from starkv.export.checkpoint import Checkpoint
from starkv.export.compress import write_compress_graphs
from starkv.export.data_file import DataFile, move_weights
from starkv.export.disk_space import check_disk_space, export_bytes
from starkv.export.embedding import write_embedding
from starkv.export.fingerprint import export_fingerprint
from starkv.export.graph import GraphBuilder
from starkv.export.journal import Journal
from starkv.export.models.config import ModelConfig
from starkv.export.models.families import Family, check_tensors
from starkv.export.models.qwen2_decoder import EMBEDDING, HEAD, build_decoder
from starkv.export.progress import NoProgress, Progress
from starkv.export.quantize.calibration import Calibration
from starkv.export.quantize.presets import Preset, preset_for
from starkv.export.record import RECORD_NAME, SCHEMA_VERSION, ExportRecord, Route, read_record, write_record
from starkv.export.resume import NOTES, partial_directory, resumable_directory
from starkv.export.side_files import copy_side_files, image_limits, special_tokens
from starkv.export.weight_source import WeightSource
from starkv.export.weights import WeightWriter

VISION = "vision"
DECODER = "decoder"
"""Each graph is ``{name}.onnx`` with its weights in ``{name}.data``."""

_STORED_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class _Export:
    """One export: what goes in, and where it goes."""

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig
    card: ModelCard
    preset: Preset
    directory: Path
    journal: Journal
    progress: Progress

    def graph(self, name: str, source: WeightSource | None = None) -> GraphBuilder:
        """Begin a graph; its weights come from the checkpoint unless another source is given."""
        preset = self.preset
        weights = WeightWriter(
            source or self.checkpoint,
            DataFile(self.directory / f"{name}.data", self.journal),
            self.progress,
            preset.block_size,
            preset.keep_packed,
            self.checkpoint.folder,
        )
        return GraphBuilder(name, weights, preset.vision if name == VISION else preset.decoder)

    def save(self, model: ir.Model, name: str) -> None:
        ir.save(model, self.directory / f"{name}.onnx")


def export_model(
    folder: Path,
    card: ModelCard,
    out: Path,
    preset: Preset,
    progress: Progress | None = None,
    route: Route = "build",
    calibration: Calibration | None = None,
    reuse: bool = False,
) -> ExportRecord:
    """Export the checkpoint in ``folder`` into the directory ``out``.

    ``out`` appears complete or not at all; an earlier export there is replaced. The same input gives the same
    bytes. Memory holds a few chunks of one weight at a time (``route="trace"``: the whole model). An export
    that was killed, or ran out of disk space, is continued by the next one of the same input.

    Args:
        folder: checkpoint.
        card: what is known of the model beyond it.
        out: directory to make.
        preset: how weights are stored; see ``preset_for`` about checkpoints that are quantized already.
        progress: told about each step.
        route: how the decoder's graph comes about.
        calibration: prompts for a preset that needs them.
        reuse: return an export of the same input that is there already.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or not supported.
        UsageError: ``out`` holds something else, the preset doesn't fit the model or the route, there is no
            calibration although the preset needs it, or there is too little disk space.
    """
    progress = progress or NoProgress()
    with Checkpoint(folder) as checkpoint:
        family = checkpoint.family
        config = family.parse_config(checkpoint.config, folder / "config.json")
        check_tensors(checkpoint, family, config)
        preset = preset_for(preset, checkpoint.quantization)
        if route == "trace" and preset.name != "fp32":
            raise UsageError(
                f"the trace route exports fp32 only, not {preset.name}; use the build route or --quant fp32"
            )
        if route == "trace" and checkpoint.quantization is not None:
            raise UsageError("the trace route reads no quantized checkpoint; use the build route")
        if preset.calibrated and calibration is None:
            raise UsageError(f"quantization {preset.name} needs calibration prompts")
        fingerprint = export_fingerprint(
            folder, card, preset, route, calibration.digest if calibration and preset.calibrated else ""
        )
        if reuse and (out / RECORD_NAME).is_file() and read_record(out).fingerprint == fingerprint:
            return read_record(out)
        check_disk_space(out, export_bytes(checkpoint, preset), partial_directory(out))
        with resumable_directory(out, RECORD_NAME, fingerprint) as directory:
            journal = Journal(directory / NOTES)
            job = _Export(checkpoint, family, config, card, preset, directory, journal, progress)
            _write(job, route, calibration)
            record = _describe(job, route, fingerprint)
            write_record(directory, record)
    return record


def _write(job: _Export, route: Route, calibration: Calibration | None) -> None:
    checkpoint, directory = job.checkpoint, job.directory
    copy_side_files(checkpoint.folder, directory)
    tower = [name for name in checkpoint.names() if name.startswith("model.visual.")]
    job.progress.start(VISION, len(tower))
    graph = job.graph(VISION)
    job.family.build_vision(graph, job.config)
    job.save(graph.model(), VISION)

    job.progress.start("embedding", 1)
    write_embedding(checkpoint, f"{EMBEDDING}.weight", directory)
    job.progress.advance(EMBEDDING)

    if route == "trace":
        _trace_decoder(job)
    else:
        source = _calibrated_source(job, calibration) if calibration and job.preset.calibrated else None
        _write_decoder(job, source)
    write_compress_graphs(directory, job.config.text)


def _write_decoder(job: _Export, source: WeightSource | None) -> None:
    # A tied embedding is also the head; any other stays outside the graph.
    head, unused = (EMBEDDING, HEAD) if job.config.text.tied_embedding else (HEAD, EMBEDDING)
    outside = ("model.visual.", f"{unused}.")
    job.progress.start(DECODER, sum(not name.startswith(outside) for name in job.checkpoint.names()))
    graph = job.graph(DECODER, source)
    build_decoder(graph, job.config, job.card.observation_window, head, job.preset.head)
    job.save(graph.model(), DECODER)


def _calibrated_source(job: _Export, calibration: Calibration) -> WeightSource:
    # Needs torch, which no other preset does.
    from starkv.export.quantize.awq import ScaledSource, search_scales

    sequences = calibration.sequences(job.directory, job.progress)
    plan = search_scales(
        job.checkpoint, job.config, sequences, job.preset, job.progress, job.directory / NOTES
    )
    return ScaledSource(job.checkpoint, plan)


def _trace_decoder(job: _Export) -> None:
    # The only module that needs torch and transformers.
    from starkv.export.trace import trace_decoder

    job.progress.start(DECODER, 1)
    model = trace_decoder(job.checkpoint.folder, job.config, job.card.observation_window)
    move_weights(model, DataFile(job.directory / f"{DECODER}.data", job.journal))
    job.save(model, DECODER)
    job.progress.advance(DECODER)


def _describe(job: _Export, route: Route, fingerprint: str) -> ExportRecord:
    checkpoint, config, card = job.checkpoint, job.config, job.card
    embedding = _STORED_NAMES[checkpoint.stored_dtype(f"{EMBEDDING}.weight")]
    return ExportRecord(
        schema_version=SCHEMA_VERSION,
        name=card.name,
        family=job.family.name,
        licence=card.licence,
        source=job.card.origin,
        route=route,
        fingerprint=fingerprint,
        coordinates=card.coordinates,
        prompt=card.prompt,
        text=config.text,
        vision=config.vision,
        tokens=special_tokens(checkpoint.folder, checkpoint.config),
        image=image_limits(checkpoint.folder, card.min_pixels, card.max_pixels),
        quantization=job.preset.describe(embedding, checkpoint.quantization),
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
        files=sorted(path.name for path in job.directory.iterdir() if path.is_file()),
    )
