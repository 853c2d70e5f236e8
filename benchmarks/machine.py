# SPDX-License-Identifier: Apache-2.0
"""What a benchmark writes down about the machine it ran on."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

from starkv.host import cpu_model, usable_processors

_TELLING_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)
"""Instructions that decide how fast int4 weights are multiplied."""


def processor_flags() -> list[str]:
    """Those of the telling instructions that the processor has, in the kernel's spelling."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return []
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return [flag for flag in _TELLING_FLAGS if flag in value.split()]
    return []


def memory_mib(field: str) -> float:
    """A field of ``/proc/meminfo``, such as ``MemAvailable``, in MiB; infinite where there is none."""
    path = Path("/proc/meminfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) / 1024
    return float("inf")


def describe_machine() -> dict[str, Any]:
    """Date, processor, its instructions, memory, and how busy the machine was in the last minute."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "processor": cpu_model(),
        "processor_flags": processor_flags(),
        "usable_processors": usable_processors(),
        "memory_gib": round(memory_mib("MemTotal") / 1024, 1),
        "python": platform.python_version(),
        "load_average": load_average(),
    }


class OthersShare:
    """How much of the processors everything but one process used since this object was made.

    Time that a virtual machine's host kept for others counts too. Always 0 where there is no ``/proc/stat``.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._busy, self._all = _processor_ticks()
        self._own = _process_ticks(pid)

    def __call__(self) -> float:
        busy, everything = _processor_ticks()
        own = _process_ticks(self._pid) - self._own
        elapsed = everything - self._all
        return max(0.0, (busy - self._busy - own) / elapsed) if elapsed else 0.0


def _processor_ticks() -> tuple[int, int]:
    """Busy and all ticks of all processors since the start of the machine."""
    path = Path("/proc/stat")
    if not path.is_file():
        return 0, 0
    ticks = [int(value) for value in path.read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def _process_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def load_average() -> list[float]:
    """Runnable processes in the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]
