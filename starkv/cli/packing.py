# SPDX-License-Identifier: Apache-2.0
"""Packing an engine's cache, for ``pack``, ``build`` and engines that are found by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.errors import EngineError, UsageError
from starkv.kv_packing.options import KvQuant, PackingOptions

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


def pack_trained(engine: Path, out: Path, factors: Path, quant: KvQuant) -> "Manifest":
    """Make of an engine one that packs its cache with trained factors.

    Args:
        engine: for ONNX Runtime on processors, without a packed cache.
        out: where to; an engine there is replaced.
        factors: file that ``starkv train-kv`` wrote.
        quant: of the latents.

    Raises:
        StarkvError: the engine can't be packed, or the file holds no factors of its model.
    """
    from starkv.export.build.pack import check_packable_engine, describe_packing, pack_ort_engine
    from starkv.export.staging import check_replaceable
    from starkv.kv_packing.file import load_packing
    from starkv.kv_packing.low_rank import LowRankPacking
    from starkv.kv_packing.retarget import check_factors, packing_from_factors
    from starkv.manifest import MANIFEST_NAME, read_manifest, verify_files

    check_replaceable(out, MANIFEST_NAME)
    manifest = read_manifest(engine)
    check_packable_engine(engine, manifest)
    verify_files(engine, manifest)
    try:
        trained = load_packing(factors)
    except EngineError:
        trained = None
    if not isinstance(trained, LowRankPacking):
        raise UsageError(f"{factors} holds no low-rank factors; `starkv train-kv` writes such a file")
    check_factors(trained, manifest.text, str(factors))
    options = PackingOptions(quant, trained.rank_share)
    packing = packing_from_factors(trained, quant)
    description = describe_packing(packing, options, tokens=0, trained=True)
    return pack_ort_engine(engine, out, packing, description)
