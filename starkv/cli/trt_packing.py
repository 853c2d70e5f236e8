# SPDX-License-Identifier: Apache-2.0
"""Scales of a TensorRT engine that keeps codes: the engine measures them itself, on its card."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from starkv.errors import EngineError, UsageError
from starkv.kv_packing.options import PackingOptions

if TYPE_CHECKING:
    from starkv.calibration.kv_statistics import Biases
    from starkv.cli.console import StageProgress
    from starkv.kv_packing.quantized import QuantizedPacking
    from starkv.manifest import KvPacking, Manifest


def with_scales(
    exported: Path, engine: Path, manifest: "Manifest", calibration: Path | None, stages: "StageProgress"
) -> "Manifest":
    """Measure scales of an engine that was just built, and put them into its directory.

    Args:
        exported: that it was built from; knows the projections' biases.
        engine: its directory.
        manifest: of it.
        calibration: folder with prompts; the model's own by default.
        stages: told about every prompt.

    Raises:
        StarkvError: the engine can't run here, or calibration has too few tokens.
    """
    import onnx_ir as ir

    from starkv.export.build.pack import write_packing
    from starkv.export.lower.attention_weights import projection_biases

    biases = projection_biases(ir.load(exported / "decoder.onnx"))
    return write_packing(engine, manifest, *_measured(engine, manifest, biases, calibration, stages))


def measure_again(engine: Path, out: Path, calibration: Path | None, stages: "StageProgress") -> "Manifest":
    """Make of an engine one with scales from other prompts; nothing is built anew.

    Args:
        engine: for TensorRT, built with ``--kv-quant``.
        out: where to; an engine there is replaced.
        calibration: folder with prompts; the model's own by default.
        stages: told about every prompt.

    Raises:
        StarkvError: the engine keeps no codes or can't run here, or calibration has too few tokens.
    """
    from starkv.export.build.pack import replace_packing
    from starkv.export.staging import check_replaceable
    from starkv.kv_packing.file import PACKING_NAME, load_packing
    from starkv.kv_packing.quantized import QuantizedPacking
    from starkv.manifest import MANIFEST_NAME, read_manifest

    check_replaceable(out, MANIFEST_NAME)
    manifest = read_manifest(engine)
    if manifest.kv_packing is None:
        raise UsageError(
            f"{engine} keeps rows as they are, which a TensorRT engine is built for; build it again with "
            "`starkv build MODEL --backend trt --kv-quant int8`"
        )
    packing = load_packing(engine / PACKING_NAME)
    if not isinstance(packing, QuantizedPacking):
        raise EngineError(f"{engine / PACKING_NAME} holds no scales; build the engine again")
    biases = [
        (layer.key_bias.astype(np.float32), layer.value_bias.astype(np.float32)) for layer in packing.layers
    ]
    return replace_packing(engine, out, *_measured(engine, manifest, biases, calibration, stages), link=True)


def _measured(
    engine: Path,
    manifest: "Manifest",
    biases: "Sequence[Biases]",
    calibration: Path | None,
    stages: "StageProgress",
) -> "tuple[QuantizedPacking, KvPacking]":
    from starkv.calibration.kv_packing import quantized_packing
    from starkv.calibration.kv_prompts import kv_prompts
    from starkv.calibration.kv_statistics import gather_statistics
    from starkv.export.build.pack import describe_packing
    from starkv.runtime.engines.trt import TrtEngine
    from starkv.runtime.preprocess.tokenizer import ChatTokenizer

    bits = None if manifest.tensorrt is None else manifest.tensorrt.kv_bits
    if bits is None:
        raise EngineError(f"{engine} was built for no codes; build it again with --kv-quant")
    prompts = kv_prompts(manifest.name, manifest.image.max_pixels, calibration)
    tokenizer = ChatTokenizer.from_directory(engine)
    statistics = gather_statistics(
        TrtEngine(engine, verify=False), tokenizer, biases, prompts, progress=stages
    )
    packing = quantized_packing(bits, statistics, biases)
    return packing, describe_packing(packing, PackingOptions.of_codes(bits), statistics.tokens)
