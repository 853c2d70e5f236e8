# SPDX-License-Identifier: Apache-2.0
"""Time of one prompt's compression on a GPU at the shape of UI-TARS-1.5-7B, all implementations in one run.

    python benchmarks/compress_gpu.py --official path/to/STaR-KV --out results.json

28 layers, 28 query and 4 KV heads of 128, bfloat16, random keys and queries, one and five 1080p screenshots
and five 4K ones. Each cell compresses all layers once, out of place into a slot. ``graph`` is the CUDA
library's call captured as a CUDA graph.

The least that any implementation must move: keys once, kept rows of keys and values read and written. Bytes
per second over that count are compared with a large copy on the same card.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_measure import (
    copy_bandwidth,
    describe_gpu,
    gpu_or_exit,
    interleaved,
    kernel_times,
    milliseconds,
    official_runner,
    ratio,
    replayed,
)

from starkv.kernels.compress_call import CompressResult
from starkv.kernels.cuda_library import find_library
from starkv.kernels.triton_compress import compress as triton_compress
from starkv.methods.star_kv_config import StarKVConfig
from starkv.validation.compress_cases import UI_TARS_7B, CompressCase, CompressSize, make_case
from starkv.validation.compress_checks import reference_compress
from starkv.validation.report import markdown_table, write_json

SCREENS = {"1 x 1080p": ((39, 69), 1), "5 x 1080p": ((39, 69), 5), "5 x 4K": ((77, 137), 5)}
BUDGETS = (0.05, 0.2, 0.4)
OFFICIAL = "official code"
HEADER = ("one prompt, 28 layers", "budget", OFFICIAL, "torch", "Triton", "CUDA", "CUDA graph", "of the copy")


def least_bytes(case: CompressCase) -> int:
    """Bytes that any implementation reads and writes."""
    heads, limits = case.size.heads, case.request.limits
    row = heads.layers * heads.kv_heads * heads.head_dim * case.prefill.keys.element_size()
    return row * (case.size.prompt.length + 4 * (limits.mean + case.request.window))


def runners_of(case: CompressCase, checkout: Path | None) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    library = find_library("cuda")
    if library is None:
        raise SystemExit("no libstarkv_kernels.so: `make plugin` builds it, or STARKV_KERNELS names one")
    call = case.call()
    result = CompressResult.empty_for(call)
    compress = library.compress
    runners: dict[str, Callable[[], object]] = {}
    if checkout:
        runners[OFFICIAL] = official_runner(case, checkout)
    runners["torch"] = lambda: reference_compress(case)
    runners["Triton"] = lambda: triton_compress(call)
    runners["CUDA"] = lambda: compress(call, result)
    runners["CUDA graph"] = replayed(lambda: compress(call, result))
    return runners


def measure(case: CompressCase, device: torch.device, checkout: Path | None, rounds: int) -> dict[str, Any]:
    """Seconds of every implementation, and what they mean."""
    runners = runners_of(case, checkout)
    times = interleaved(runners, device, rounds, slow=(OFFICIAL, "torch"))
    return {
        "seconds": times,
        "least_bytes": least_bytes(case),
        "times_of_cuda": {name: ratio(own, times["CUDA"]) for name, own in times.items()},
        "kernels": kernel_times(runners["CUDA"]),
        "triton_kernels": kernel_times(runners["Triton"]),
    }


def cells(figures: dict[str, Any], bandwidth: float) -> list[str]:
    """One row of the table behind its first two cells."""
    times, row = figures["seconds"], []
    for name in HEADER[2:7]:
        if name not in times:
            row.append("–")
            continue
        slower = ratio(times[name], times["CUDA"])
        row.append(milliseconds(times[name]) + ("" if name.startswith("CUDA") else f" ({slower:,.1f}x)"))
    share = figures["least_bytes"] / statistics.median(times["CUDA graph"]) / bandwidth
    figures["share_of_copy_bandwidth"] = share
    return [*row, f"{share:.0%}"]


def run(device: torch.device, checkout: Path | None = None, rounds: int = 30) -> tuple[str, dict[str, Any]]:
    """The whole benchmark: a Markdown table and the figures."""
    bandwidth = copy_bandwidth(device)
    table, figures = [], {}
    for screens, (grid, count) in SCREENS.items():
        for budget in BUDGETS:
            size = CompressSize(screens, UI_TARS_7B, grid, count, budget)
            config = replace(StarKVConfig(), score_dtype="float32")
            case = make_case(size, config, torch.bfloat16, device)
            name = f"{screens}, {size.prompt.length:,} rows"
            result = measure(case, device, checkout, rounds)
            table.append([name, f"{budget:.0%}", *cells(result, bandwidth)])
            figures[f"{name}, {budget:.0%}"] = result
            del case
            torch.cuda.empty_cache()
    return markdown_table(HEADER, table), {"copy_bytes_per_second": bandwidth, "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, help="checkout of the official STaR-KV repository")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    device = gpu_or_exit()
    table, figures = run(device, args.official, args.rounds)
    print(table)
    if args.out:
        write_json(args.out, {"benchmark": "compress_gpu", "gpu": describe_gpu(device), **figures})


if __name__ == "__main__":
    main()
