# SPDX-License-Identifier: Apache-2.0
"""Files of an engine for TensorRT beside its plans, and the room that all of them take."""

import shutil
from pathlib import Path

from starkv.export.record import ExportRecord
from starkv.trt_compat.plugin_file import kernels_beside
from starkv.trt_compat.plugins import LIBRARY_NAME

PLANNED_GRAPHS = ("vision", "decoder", "compress")
"""Graphs that become plans; the export's other graphs run on the processor."""
_SIZES = {"fp32": 0.5, "int8": 2.0}
"""Storage → bytes of its 16-bit form, as a share of its own. Four-bit weights stay what they are."""


def side_files(record: ExportRecord) -> list[str]:
    """Files of an export that an engine takes over as they are."""
    return [name for name in record.files if name.partition(".")[0] not in PLANNED_GRAPHS]


def copy_libraries(plugins: Path, directory: Path) -> None:
    """Copy the plugins, and the kernels of the same build where there are any."""
    shutil.copyfile(plugins, directory / LIBRARY_NAME)
    kernels = kernels_beside(plugins)
    if kernels is not None:
        shutil.copyfile(kernels, directory / kernels.name)


def lowered_bytes(export_dir: Path, record: ExportRecord) -> int:
    """About what the weights of the lowered graphs take."""
    stored, text = record.quantization, record.text
    decoder, vision = ((export_dir / f"{name}.data").stat().st_size for name in ("decoder", "vision"))
    # The head is stored in its own way, and is a large part of a small model.
    bytes_each = {"fp32": 4.0, "int8": 1.0, "int4": 0.5}.get(stored.head, 1.0)
    head = min(decoder, text.vocab * text.hidden * bytes_each)
    return int(
        vision * _SIZES.get(stored.vision, 1.0)
        + head * _SIZES.get(stored.head, 1.0)
        + (decoder - head) * _SIZES.get(stored.decoder, 1.0)
    )
