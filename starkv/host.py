# SPDX-License-Identifier: Apache-2.0
"""What a host is: its processor, and how much of it this process may use."""

import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_model() -> str:
    """Name the processor, e.g. ``AMD EPYC 9B45``; weights packed for one model don't suit another."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable_processors() -> int:
    """Processors this process may run on, which in a container is often fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1
