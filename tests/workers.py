# SPDX-License-Identifier: Apache-2.0
"""Tests in several processes at once: each has a core of its own, and what they build is built once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def take_own_core() -> None:
    """In a worker of pytest-xdist: run on one core. Runtimes that start a thread per core would get into
    each other's way."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where the kernels are not built for the processor either
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
