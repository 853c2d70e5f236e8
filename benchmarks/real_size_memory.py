# SPDX-License-Identifier: Apache-2.0
"""Run a command as a user would and see how long it takes and how much memory it holds meanwhile."""

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers_protocol import resident_memory

_INTERVAL_SECONDS = 0.05


class StepFailedError(Exception):
    """The command ended with another status than 0."""


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    peak_resident_mib: float
    """``VmHWM``: highest resident memory, with pages of mapped files, which the kernel may drop."""
    peak_anonymous_mib: float
    """Highest ``RssAnon`` that was seen, 20 times a second: memory that only swapping could free."""
    peak_file_mib: float
    """Highest ``RssFile`` that was seen: resident pages of mapped files."""

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 2) for name, value in asdict(self).items()}


def run_measured(command: Sequence[str | Path], log: Path) -> tuple[str, Cost]:
    """Run ``command`` and return its standard output; its standard error goes to ``log``.

    Raises:
        StepFailedError: it failed; the message names the log.
    """
    started = time.perf_counter()
    with log.open("wb") as errors:
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=errors)
    peaks = {"VmHWM": 0.0, "RssAnon": 0.0, "RssFile": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_INTERVAL_SECONDS):
            now = resident_memory(process.pid)
            for name in peaks:
                peaks[name] = max(peaks[name], now.get(name, 0.0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert process.stdout is not None
        output = process.stdout.read().decode()
        # Of this child alone; getrusage would mix all children so far.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        ended.set()
        watcher.join()
        process.stdout.close()
    if process.returncode:
        raise StepFailedError(
            f"{' '.join(map(str, command[:4]))}… ended with {process.returncode}; see {log}"
        )
    seconds = time.perf_counter() - started
    peak = usage.ru_maxrss / 1024
    if peak <= resident_memory(os.getpid())["VmHWM"]:
        # A child inherits that figure from us: only a higher one is its own.
        peak = peaks["VmHWM"]
    return output, Cost(seconds, peak, peaks["RssAnon"], peaks["RssFile"])
