# SPDX-License-Identifier: Apache-2.0
"""How much disk space an export takes, asked before the work begins."""

import math
import shutil
from pathlib import Path

from starkv.errors import UsageError
from starkv.export.checkpoint import Checkpoint
from starkv.export.quantize.presets import Preset, Storage
from starkv.export.safetensors_header import DTYPES

GIB = 2**30


def export_bytes(checkpoint: Checkpoint, preset: Preset) -> int:
    """Bytes of the graphs' weights and the embedding table, to within a few percent."""
    total = 0.0
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        size = math.prod(shape)
        if ".embed_tokens." in name:
            total += size * DTYPES[checkpoint.stored_dtype(name)].itemsize
            if not any(head.startswith("lm_head.") for head in checkpoint.names()):
                total += size * _bytes_per_weight(preset.head, preset.block_size)
            continue
        storage: Storage = "fp32"
        if len(shape) > 1:
            vision = name.startswith("model.visual.")
            storage = preset.vision if vision else preset.head if "lm_head" in name else preset.decoder
        total += size * _bytes_per_weight(storage, preset.block_size)
    return int(total)


def _bytes_per_weight(storage: Storage, block_size: int) -> float:
    if storage == "fp32":
        return 4.0
    # A scale in float32 for each block.
    return (0.5 if storage == "int4" else 1.0) + 4.0 / block_size


def free_space(out: Path) -> tuple[Path, int]:
    """The folder whose file system ``out`` will lie in, and its free bytes; ``out`` need not exist."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    return above, shutil.disk_usage(above).free


def check_disk_space(out: Path, needed: int, partial: Path | None = None) -> None:
    """Refuse to begin what can't be finished.

    Args:
        out: what will be written, need not exist.
        needed: bytes.
        partial: a directory of an earlier run, whose bytes count as written.

    Raises:
        UsageError: there is less space.
    """
    above, free = free_space(out)
    written = 0
    if partial is not None and partial.is_dir():
        written = sum(path.stat().st_size for path in partial.iterdir() if path.is_file())
    if free + written < needed:
        raise UsageError(
            f"{out} needs about {needed / GIB:.1f} GiB of disk space, {above} has {free / GIB:.1f} GiB free; "
            "free some, or choose another --out"
        )
