# SPDX-License-Identifier: Apache-2.0
"""Directories that appear complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starkv.errors import UsageError


@contextmanager
def staged_directory(out: Path, marker: str) -> Iterator[Path]:
    """Yield a directory beside ``out`` that replaces ``out`` when the block ends well and vanishes otherwise.

    Args:
        out: final place; its parents are made.
        marker: file by which a directory of ours is recognised. Only such a directory, or an empty one,
            is ever replaced.

    Raises:
        UsageError: ``out`` exists and is something else.
    """
    out = out.absolute()
    check_replaceable(out, marker)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        # mkdtemp keeps everyone else out; the result is an ordinary directory.
        staging.chmod(0o777 & ~_umask())
        yield staging
        check_replaceable(out, marker)
        replace_directory(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(out: Path, marker: str) -> None:
    """Refuse to replace anything but an empty directory or one of ours.

    Raises:
        UsageError: ``out`` exists and has no ``marker``.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise UsageError(f"{out} exists and is no directory; choose another --out")
    if any(out.iterdir()) and not (out / marker).is_file():
        raise UsageError(
            f"{out} exists, has files and no {marker}, so it is not overwritten; choose another --out"
        )


def replace_directory(staging: Path, out: Path) -> None:
    """Put ``staging`` in the place of ``out``; an old directory there is deleted only after that."""
    if not out.exists():
        staging.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    out.rename(old / "content")
    try:
        staging.rename(out)
    except OSError:
        (old / "content").rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
