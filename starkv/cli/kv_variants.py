# SPDX-License-Identifier: Apache-2.0
"""An engine with a plain KV cache → the same engine with packed ones, from statistics that are gathered once."""

from collections.abc import Sequence
from pathlib import Path

from starkv.calibration.held_out import EMBEDDED, suite_prompts
from starkv.calibration.kv_packing import PackingOptions, make_packing
from starkv.calibration.kv_statistics import KvStatistics, gather_statistics
from starkv.calibration.prompts import GuiPrompt, drawn_prompts
from starkv.export.build.pack import attention_biases, pack_ort_engine
from starkv.export.progress import NoProgress, Progress
from starkv.kv_packing.file import Packing
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.manifest import KvPacking, Manifest
from starkv.runtime.engines.opening import open_engine
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

PROMPTS = 40
"""Prompts that statistics are gathered from: more image tokens than are counted, on most models."""


def calibration_prompts(manifest: Manifest, count: int = PROMPTS) -> list[GuiPrompt]:
    """Prompts that no validation asks: of the synthetic suite's training split for the embedded model, drawn
    desktops for others."""
    if manifest.name == EMBEDDED:
        return suite_prompts("train", count)
    return drawn_prompts(count, manifest.image.max_pixels)


def statistics_of(
    engine: Path, prompts: Sequence[GuiPrompt] | None = None, progress: Progress | None = None
) -> KvStatistics:
    """What keys and values of an engine look like.

    Args:
        engine: for ONNX Runtime on processors, not packed.
        prompts: to measure on; :func:`calibration_prompts` by default.
        progress: told of every prompt.

    Raises:
        StarkvError: the engine can't be packed, or the prompts don't do.
    """
    biases = attention_biases(engine)
    opened = open_engine(engine, verify=False, device="cpu")
    chosen = calibration_prompts(opened.manifest) if prompts is None else prompts
    tokenizer = ChatTokenizer.from_directory(engine)
    return gather_statistics(opened, tokenizer, biases, chosen, progress=progress)


def pack_variants(
    engine: Path,
    wanted: Sequence[PackingOptions],
    home: Path,
    statistics: KvStatistics,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Pack an engine in several ways; its large files are shared with the packed ones where they can be.

    Args:
        engine: for ONNX Runtime on processors, not packed.
        wanted: ways to pack.
        home: folder of the packed engines.
        statistics: of the engine.
        progress: told of every variant.

    Returns:
        name of each way → engine.

    Raises:
        StarkvError: the engine can't be packed so, or the disk is full.
    """
    biases = attention_biases(engine)
    progress = progress or NoProgress()
    progress.start("packing", len(wanted))
    found = {}
    for options in wanted:
        packing = make_packing(options, statistics, biases)
        description = KvPacking(
            quant=options.quant,
            rank=options.rank,
            bytes_per_row=packed_row_bytes(packing),
            calibration_tokens=statistics.tokens,
        )
        found[options.name] = home / options.name
        pack_ort_engine(engine, found[options.name], packing, description, link=True)
        progress.advance(options.name)
    return found


def packed_row_bytes(packing: Packing) -> int:
    """Bytes of one packed token over all layers, with scales and padding, without its positions."""
    if isinstance(packing, QuantizedPacking):
        return sum(layer.bytes_per_row for layer in packing.layers)
    return sum(packing.bytes_per_row(layer) for layer in range(len(packing.layers)))
