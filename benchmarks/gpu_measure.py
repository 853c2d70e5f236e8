# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmarks share: the card's own limits, graphs, times of single kernels, official code."""

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from official_code import official_clusters

from starkv.validation.compress_cases import CompressCase
from starkv.validation.timing import seconds_of

COPY_BYTES = 2 << 30
CACHE_BYTES = 256 << 20
"""More than any card's L2 cache holds."""


def gpu_or_exit() -> torch.device:
    """The GPU; ends the program with a message where there is none."""
    if not torch.cuda.is_available():
        print("no GPU here: PyTorch finds no CUDA device", file=sys.stderr)
        raise SystemExit(77)
    return torch.device("cuda")


def copy_bandwidth(device: torch.device, size: int = COPY_BYTES) -> float:
    """Bytes per second of a large copy within the card, counting those read and those written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / statistics.median(seconds_of(lambda: target.copy_(source), device, 20, 5))


def replayed(work: Callable[[], object]) -> Callable[[], None]:
    """The same work as one CUDA graph, captured after a warm-up; replaying it costs one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def interleaved(
    runners: dict[str, Callable[[], object]], device: torch.device, rounds: int, slow: Iterable[str] = ()
) -> dict[str, list[float]]:
    """Seconds of every runner in every round; rounds alternate, so that a slow moment hits all alike.

    Args:
        runners: what to time, by name.
        device: where.
        rounds: how often.
        slow: names that are timed in the first two rounds only.
    """
    for run in runners.values():
        run()
        run()
    torch.cuda.synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds):
        for name, run in runners.items():
            if name not in slow or number < 2:
                times[name] += seconds_of(run, device, 1, 0)
    return times


def interleaved_cold(
    runners: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """As :func:`interleaved`, with the caches overwritten before each run: in a model, a layer's rows were
    last read one token ago, and gigabytes of weights since."""
    flush = torch.empty(CACHE_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    for run in runners.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            flush.zero_()
            times[name] += seconds_of(run, device, 1, 0)
    return times


def kernel_times(work: Callable[[], object], runs: int = 5) -> dict[str, float]:
    """Seconds of each kernel in one run of ``work``, mean over runs, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            work()
        torch.cuda.synchronize()
    totals: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[short_name(event.name)] += event.time_range.elapsed_us() / 1e6 / runs
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def short_name(kernel: str) -> str:
    """A kernel's name without its arguments."""
    name = kernel.removeprefix("void ").partition("(")[0]
    return name.replace("starkv::", "")


def official_runner(case: CompressCase, checkout: Path) -> Callable[[], None]:
    """``STARKVGroupCluster.update_kv`` of the official code for all layers, from the reader's own checkout.

    It gets the repeated heads that it wants; repeating them is not timed. One layer's serve all layers.
    """
    heads, prompt, window = case.size.heads, case.size.prompt, case.request.window
    clusters = official_clusters(
        checkout, heads.layers, prompt.spans, window, window + case.request.limits.mean
    )
    sharing, prefill = heads.query_heads // heads.kv_heads, case.prefill
    keys, values = (cache[0].repeat_interleave(sharing, 1) for cache in (prefill.keys, prefill.values))
    queries = keys.new_zeros(1, heads.query_heads, prompt.length, heads.head_dim)
    queries[:, :, -window:] = prefill.window_queries[0]
    hidden = torch.randn(1, prompt.length, heads.query_heads * heads.head_dim, device=keys.device).to(keys)

    def run() -> None:
        for cluster in clusters:
            cluster.update_kv(keys, queries, values, None, sharing, hidden_states=hidden)

    return run


def milliseconds(times: list[float]) -> str:
    """Median in ms."""
    return f"{1e3 * statistics.median(times):,.3f} ms"


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over median."""
    return statistics.median(slow) / statistics.median(fast)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """The card and its driver, as PyTorch sees them."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
