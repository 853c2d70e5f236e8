# SPDX-License-Identifier: Apache-2.0
"""An engine with a plain KV cache → the same engine packed in several ways, to be compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.kv_packing.options import PackingOptions

if TYPE_CHECKING:
    from starkv.cli.console import StageProgress


def pack_variants(
    engine: Path,
    wanted: Mapping[str, PackingOptions],
    home: Path,
    stages: "StageProgress",
    calibration: Path | None = None,
) -> dict[str, Path]:
    """Pack an engine in several ways; what they need to know of its keys and values is measured once.

    Args:
        engine: for ONNX Runtime on processors, without a packed cache.
        wanted: ways to pack, by any names.
        home: folder of the packed engines, which share files with ``engine`` where the file system can.
        stages: told about every prompt and engine.
        calibration: folder with prompts; the model's own by default.

    Returns:
        name → engine.

    Raises:
        StarkvError: the engine can't be packed so, calibration has too few tokens, or the disk has no room.
    """
    from starkv.calibration.kv_packing import make_packing
    from starkv.cli.packing import measure
    from starkv.export.build.pack import attention_biases, describe_packing, pack_ort_engine

    biases = attention_biases(engine)
    statistics = measure(engine, biases, calibration, stages)
    stages.start("packing", len(wanted))
    found = {}
    for name, options in wanted.items():
        packing = make_packing(options, statistics, biases)
        description = describe_packing(packing, options, statistics.tokens)
        found[name] = home / options.directory_suffix
        pack_ort_engine(engine, found[name], packing, description, link=True)
        stages.advance(name)
    return found
