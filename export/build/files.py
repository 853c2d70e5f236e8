# SPDX-License-Identifier: Apache-2.0
"""Files of engine directories: shared or copied, and the room for them."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starkv.errors import UsageError
from starkv.export.disk_space import GIB, free_space


def link_or_copy(source: Path, target: Path, link: bool) -> None:
    """Copy a file, or share it by a hard link where that is wanted and possible.

    Never by a symbolic link: ONNX Runtime refuses data behind one that leaves the model's directory.
    """
    if link:
        try:
            os.link(source, target)
        except OSError:
            # Another file system, or one without hard links.
            pass
        else:
            return
    shutil.copyfile(source, target)


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
