# SPDX-License-Identifier: Apache-2.0
"""Files of an engine for TensorRT beside its plans, and the room that all of them take."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starkv.errors import UsageError
from starkv.export.disk_space import GIB, free_space
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


def link_or_copy(source: Path, target: Path, link: bool) -> None:
    """Copy a file, or share it by a hard link where that is wanted and possible."""
    if link:
        try:
            os.link(source, target)
        except OSError:
            # Another file system, or one without hard links.
            pass
        else:
            return
    shutil.copyfile(source, target)


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


@contextmanager
def enough_space(directory: Path, needed: int) -> Iterator[None]:
    """Check that a file system has room, before the work and if it fails.

    Args:
        directory: where it is needed.
        needed: bytes.

    Raises:
        UsageError: there is less, or the disk is full before the block ends.
    """
    _, free = free_space(directory)
    message = (
        f"no room for the engine: it needs about {needed / GIB:.2f} GiB in {directory.parent}, and "
        f"{free / GIB:.2f} GiB are free; free some, or choose another --out"
    )
    if needed > free:
        raise UsageError(message)
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UsageError(message) from None
