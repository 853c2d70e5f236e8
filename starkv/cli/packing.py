# SPDX-License-Identifier: Apache-2.0
"""Packing an engine's cache, for ``pack``, ``build`` and engines that are found by name."""

from pathlib import Path
from typing import TYPE_CHECKING

from starkv.kv_packing.options import PackingOptions

if TYPE_CHECKING:
    from starkv.cli.console import StageProgress
    from starkv.manifest import Manifest


def pack_engine(
    engine: Path,
    out: Path,
    options: PackingOptions,
    stages: "StageProgress",
    calibration: Path | None = None,
    link: bool = False,
) -> "Manifest":
    """Make of an engine one that packs its cache.

    Args:
        engine: for ONNX Runtime on processors, without a packed cache.
        out: where to; an engine there is replaced.
        options: how rows are packed.
        stages: told about every prompt.
        calibration: folder with prompts; the model's own by default.
        link: share files by hard links.

    Raises:
        StarkvError: the engine can't be packed, calibration has too few tokens, or the disk has no room.
    """
    from starkv.calibration.kv_packing import make_packing
    from starkv.calibration.kv_prompts import kv_prompts
    from starkv.calibration.kv_sensitivity import measure_sensitivities
    from starkv.calibration.kv_statistics import gather_statistics
    from starkv.export.build.pack import (
        attention_weights,
        check_packable_engine,
        describe_packing,
        pack_ort_engine,
    )
    from starkv.export.staging import check_replaceable
    from starkv.manifest import MANIFEST_NAME, read_manifest
    from starkv.runtime.engines.ort import OrtEngine
    from starkv.runtime.preprocess.tokenizer import ChatTokenizer

    check_replaceable(out, MANIFEST_NAME)
    check_packable_engine(engine, read_manifest(engine))
    # Opened first, because that checks the files.
    opened, tokenizer = OrtEngine(engine), ChatTokenizer.from_directory(engine)
    weights = attention_weights(engine)
    prompts = kv_prompts(opened.manifest.name, opened.manifest.image.max_pixels, calibration)
    statistics = gather_statistics(opened, tokenizer, weights.biases, prompts, progress=stages)
    packing = make_packing(
        options,
        statistics,
        weights.biases,
        weights.outputs,
        lambda layers, share: measure_sensitivities(opened, tokenizer, layers, share, prompts, stages),
    )
    description = describe_packing(packing, options, statistics.tokens)
    return pack_ort_engine(engine, out, packing, description, link)
