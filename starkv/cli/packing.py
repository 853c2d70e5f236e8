# SPDX-License-Identifier: Apache-2.0
"""Packing an engine's cache, for ``pack``, ``build`` and engines that are found by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.kv_packing.options import PackingOptions

if TYPE_CHECKING:
    from starkv.calibration.kv_sensitivity import LayerFactors, Sensitivity
    from starkv.cli.console import StageProgress
    from starkv.manifest import Manifest


class Packer:
    """Packs one engine, once or in several ways: what that needs to know of the model is measured once.

    Args:
        engine: for ONNX Runtime on processors, without a packed cache.
        stages: told about every prompt.
        calibration: folder with prompts; the model's own by default.

    Raises:
        StarkvError: the engine can't be packed, or calibration has too few tokens.
    """

    def __init__(self, engine: Path, stages: "StageProgress", calibration: Path | None = None) -> None:
        from starkv.calibration.kv_prompts import kv_prompts
        from starkv.calibration.kv_statistics import gather_statistics
        from starkv.export.build.pack import attention_weights, check_packable_engine
        from starkv.manifest import read_manifest
        from starkv.runtime.engines.ort import OrtEngine
        from starkv.runtime.preprocess.tokenizer import ChatTokenizer

        check_packable_engine(engine, read_manifest(engine))
        self._directory, self._stages = engine, stages
        # Opened first, because that checks the files.
        self._engine, self._tokenizer = OrtEngine(engine), ChatTokenizer.from_directory(engine)
        self._weights = attention_weights(engine)
        manifest = self._engine.manifest
        self._prompts = kv_prompts(manifest.name, manifest.image.max_pixels, calibration)
        self._statistics = gather_statistics(
            self._engine, self._tokenizer, self._weights.biases, self._prompts, progress=stages
        )
        self._sensitivities: dict[float, Sequence[Sensitivity]] = {}

    def pack(self, options: PackingOptions, out: Path, link: bool = False) -> "Manifest":
        """Write the packed engine.

        Args:
            options: how rows are packed.
            out: where to; an engine there is replaced.
            link: share files by hard links.

        Raises:
            StarkvError: no ranks do what is asked for, or the disk has no room.
        """
        from starkv.calibration.kv_packing import make_packing
        from starkv.export.build.pack import describe_packing, pack_ort_engine

        weights = self._weights
        packing = make_packing(
            options, self._statistics, weights.biases, weights.outputs, self._sensitivities_at
        )
        description = describe_packing(packing, options, self._statistics.tokens)
        return pack_ort_engine(self._directory, out, packing, description, link)

    def _sensitivities_at(self, layers: "Sequence[LayerFactors]", share: float) -> "Sequence[Sensitivity]":
        from starkv.calibration.kv_sensitivity import measure_sensitivities

        if share not in self._sensitivities:
            self._sensitivities[share] = measure_sensitivities(
                self._engine, self._tokenizer, layers, share, self._prompts, self._stages
            )
        return self._sensitivities[share]


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
    from starkv.export.staging import check_replaceable
    from starkv.manifest import MANIFEST_NAME

    check_replaceable(out, MANIFEST_NAME)
    return Packer(engine, stages, calibration).pack(options, out, link)


def pack_variants(
    engine: Path, wanted: Sequence[PackingOptions], home: Path, stages: "StageProgress"
) -> dict[PackingOptions, Path]:
    """Pack an engine in several ways.

    Args:
        engine: for ONNX Runtime on processors, without a packed cache.
        wanted: ways to pack.
        home: folder of the packed engines, which share files with ``engine`` where the file system can.
        stages: told about every prompt.

    Raises:
        StarkvError: the engine can't be packed so, calibration has too few tokens, or the disk has no room.
    """
    packer = Packer(engine, stages)
    found = {options: home / options.directory_suffix for options in wanted}
    for options, out in found.items():
        packer.pack(options, out, link=True)
    return found
