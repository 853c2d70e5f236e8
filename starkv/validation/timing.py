# SPDX-License-Identifier: Apache-2.0
"""Time of device work: events on a GPU, the clock on a processor."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds_of(
    work: Callable[[], object], device: torch.device, runs: int = 20, warm_up: int = 3
) -> list[float]:
    """Seconds of each run, measured on the device.

    Args:
        work: what to run; on a GPU it must only queue work on the current stream.
        device: where it runs.
        runs: how often it is timed.
        warm_up: runs before that are not timed.
    """
    for _ in range(warm_up):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return times
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)
    ]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def median_seconds(
    work: Callable[[], object], device: torch.device, runs: int = 20, warm_up: int = 3
) -> float:
    """Median of :func:`seconds_of`."""
    return statistics.median(seconds_of(work, device, runs, warm_up))
