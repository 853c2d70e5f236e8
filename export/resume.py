# SPDX-License-Identifier: Apache-2.0
"""Directories whose making may be interrupted: the next run goes on where the last one stopped."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from starkv.errors import UsageError
from starkv.export.staging import check_replaceable, replace_directory

NOTES = ".notes"
"""Folder inside the yielded directory for what only the next run needs; it is gone in the end."""
_FINGERPRINT = "fingerprint"


def partial_directory(out: Path) -> Path:
    """Where an unfinished ``out`` is kept."""
    out = out.absolute()
    return out.with_name(f".{out.name}.partial")


@contextmanager
def resumable_directory(out: Path, marker: str, fingerprint: str) -> Iterator[Path]:
    """Yield a directory beside ``out`` that replaces ``out`` when the block ends well.

    It holds what an earlier run of the same fingerprint left, or nothing. It stays when the block is
    interrupted or the system fails (no disk space, no such file), and vanishes when the block refuses its
    input, which makes going on pointless.

    Args:
        out: final place; its parents are made.
        marker: file by which a directory of ours is recognised, see ``staging.check_replaceable``.
        fingerprint: names everything that the result depends on.

    Raises:
        UsageError: ``out`` is something else, another process is making it, or the disk is full.
    """
    out = out.absolute()
    check_replaceable(out, marker)
    partial = partial_directory(out)
    partial.mkdir(parents=True, exist_ok=True)
    with _only_process(partial, out):
        _start_over_unless(partial, fingerprint)
        try:
            yield partial
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UsageError(
                f"the disk of {out.parent} is full; free some space and give the same command again, it goes "
                f"on where it stopped (or delete {partial})"
            ) from None
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        check_replaceable(out, marker)
        shutil.rmtree(partial / NOTES)
        replace_directory(partial, out)


def _start_over_unless(partial: Path, fingerprint: str) -> None:
    """Empty the directory if an earlier run made something else in it."""
    path = partial / NOTES / _FINGERPRINT
    if path.is_file() and path.read_text() == fingerprint:
        return
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    path.parent.mkdir()
    path.write_text(fingerprint)


@contextmanager
def _only_process(partial: Path, out: Path) -> Iterator[None]:
    """Hold the directory's lock, which the system lets go of when the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is making {out} right now; wait for it") from None
        if not partial.is_dir() or os.fstat(handle).st_ino != partial.stat().st_ino:
            # It had the lock until a moment ago, and has moved the finished directory away.
            raise UsageError(f"another process has just made {out}; look at it before you replace it")
        yield
    finally:
        with suppress(OSError):
            os.close(handle)
