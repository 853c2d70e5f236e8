# SPDX-License-Identifier: Apache-2.0
"""Decode attention over compressed caches on a GPU against dense caches, all in one run.

    python benchmarks/low_rank_gpu.py --out results.json [--tune]
    TRITON_INTERPRET=1 python benchmarks/low_rank_gpu.py --tiny    # without a GPU: does it run?

One layer's attention of one new token per sequence: 32/32 and 28/4 heads of 128, 8k to 128k rows per
sequence, one sequence and up to 16. Projections and appending are left out on both sides; the lift of values
is not. Low rank keeps a quarter of a key head's channels and 30 % of all value channels, with a raw tail of
128 rows; STAR-KV (arXiv 2606.08382) claims up to 6.9 times with 75 % removed and 4 bits, against a dense time
that was extrapolated. Rows are cells of consecutive 1080p screenshots. Runs are CUDA graphs, the L2 cache is
overwritten before each.

Ratios are against the fastest dense one. Bytes are what a run must read: rows with scales, their positions,
the tail. Every result is first compared with PyTorch in float32 on the same tensors. ``--tune`` times how the
kernel that lifts keys can cut its work.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_measure import (
    copy_bandwidth,
    describe_gpu,
    gpu_or_exit,
    interleaved_cold,
    kernel_times,
    milliseconds,
    ratio,
    replayed,
)
from low_rank_gpu_runners import DENSE, Runner, check_runners, runners_of
from triton.runtime.errors import OutOfResources

from starkv.kernels.triton_low_rank import low_rank_attention
from starkv.kernels.triton_low_rank_scores import ScoreTiles
from starkv.validation.low_rank_cases import DecodeShape, low_rank_case
from starkv.validation.report import markdown_table, write_json

HEADS = {
    "MHA 32/32": DecodeShape(heads=32, kv_heads=32, key_ranks=(32,) * 32, value_rank=1232),
    "GQA 28/4": DecodeShape(heads=28, kv_heads=4, key_ranks=(32,) * 4, value_rank=160),
}
TAIL = 128
DENSE_SHARE = 0.25
"""Of the card's memory, at most, for the dense cache; all others lie beside it."""
LARGEST_BATCH = 16


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    rows: tuple[int, ...] = (8_192, 32_768, 131_072)
    tail: int = TAIL
    shapes: tuple[str, ...] = tuple(HEADS)
    narrowed: int = 1
    """Divides heads and value ranks, to show that the benchmark runs."""
    copy_bytes: int = 2 << 30
    batches: tuple[int, ...] | None = None
    """Instead of one sequence, and as many as fit."""
    cuts: tuple[ScoreTiles, ...] = tuple(
        itertools.starmap(ScoreTiles, itertools.product((32, 64, 128), (4, 8), (1, 2, 4, 8)))
    )
    """Of ``--tune``."""


TINY = Sizes(
    rows=(70,),
    tail=5,
    narrowed=4,
    copy_bytes=1 << 20,
    shapes=("GQA 28/4",),
    batches=(2,),
    cuts=(ScoreTiles(32, 4, 1),),
)


def shape_of(name: str, rows: int, batch: int, sizes: Sizes) -> DecodeShape:
    """Full caches of ``batch`` sequences."""
    shape, by = HEADS[name], sizes.narrowed
    return replace(
        shape,
        heads=shape.heads // by,
        kv_heads=shape.kv_heads // by,
        key_ranks=shape.key_ranks[: shape.kv_heads // by],
        value_rank=shape.value_rank // by,
        capacity=rows,
        rows=(rows,) * batch,
        tail_capacity=sizes.tail,
        tail_rows=(sizes.tail,) * batch,
    )


def batches(name: str, rows: int, device: torch.device) -> list[int]:
    """One sequence, and the largest power of two that fits."""
    memory = torch.cuda.get_device_properties(device).total_memory
    dense = 2 * rows * HEADS[name].kv_heads * HEADS[name].dim * 2
    fitting = int(memory * DENSE_SHARE) // dense
    return sorted({1, max(1, min(LARGEST_BATCH, 1 << (fitting.bit_length() - 1)))}) if fitting else []


def graphs(runners: dict[str, Runner], device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed: CUDA graphs on a GPU, plain calls elsewhere."""
    if device.type != "cuda":
        return {name: runner.run for name, runner in runners.items()}
    return {name: replayed(runner.run) for name, runner in runners.items()}


def measure(shape: DecodeShape, device: torch.device, rounds: int, bandwidth: float) -> dict[str, Any]:
    """Seconds of every implementation, errors, and what they mean."""
    runners = runners_of(shape, device)
    errors = check_runners(runners)
    times = interleaved_cold(graphs(runners, device), device, rounds)
    fastest = min((name for name in DENSE if name in times), key=lambda name: statistics.median(times[name]))
    figures: dict[str, Any] = {"fastest_dense": fastest, "seconds": times, "errors": errors}
    figures["bytes"] = {name: runner.bytes_read for name, runner in runners.items()}
    figures["times_faster_than_dense"] = {name: ratio(times[fastest], own) for name, own in times.items()}
    figures["share_of_copy_bandwidth"] = {
        name: runners[name].bytes_read / statistics.median(own) / bandwidth for name, own in times.items()
    }
    if device.type == "cuda":
        figures["kernels"] = {name: kernel_times(runner.run) for name, runner in runners.items()}
    return figures


def cells(figures: dict[str, Any], names: list[str]) -> list[str]:
    """One row of the table behind its first cell."""
    row = []
    for name in names:
        faster, share = figures["times_faster_than_dense"][name], figures["share_of_copy_bandwidth"][name]
        row.append(f"{milliseconds(figures['seconds'][name])}, {faster:.2f}x, {share:.0%}")
    return row


def tune(
    shape: DecodeShape, device: torch.device, rounds: int, cuts: tuple[ScoreTiles, ...]
) -> dict[str, float]:
    """Seconds of low-rank int4 attention by how the lift of keys is cut; what doesn't fit is left out."""
    call = low_rank_case(shape, "int4", torch.bfloat16, device)
    found: dict[str, float] = {}
    for cut in cuts:
        if shape.kv_heads % (cut.heads or 1):
            continue
        runner = Runner(lambda cut=cut: low_rank_attention(call, cut).out, 0)
        name = f"{cut.rows} rows, {cut.warps} warps, {cut.heads} KV heads"
        try:
            times = interleaved_cold(graphs({name: runner}, device), device, rounds)
        except OutOfResources as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        found[name] = statistics.median(times[name])
    return dict(sorted(found.items(), key=lambda item: item[1]))


def run(
    device: torch.device, rounds: int = 30, sizes: Sizes | None = None, with_tuning: bool = False
) -> tuple[str, dict[str, Any]]:
    """The whole benchmark: a Markdown table and the figures.

    Raises:
        AssertionError: an implementation doesn't say what PyTorch says.
    """
    sizes = sizes or Sizes()
    bandwidth = copy_bandwidth(device, sizes.copy_bytes)
    table, header, figures = [], ["one layer, one token"], {}
    tuning: dict[str, dict[str, float]] = {}
    for name, rows in itertools.product(sizes.shapes, sizes.rows):
        for batch in sizes.batches or batches(name, rows, device):
            title = f"{name}, {rows:,} rows x {batch}"
            print(title, file=sys.stderr, flush=True)
            shape = shape_of(name, rows, batch, sizes)
            figures[title] = measure(shape, device, rounds, bandwidth)
            names = list(figures[title]["seconds"])
            header = ["one layer, one token", *names]
            table.append([title, *cells(figures[title], names)])
            if with_tuning:
                tuning[title] = tune(shape, device, max(1, rounds // 3), sizes.cuts)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    text = markdown_table(header, table)
    if tuning:
        best = [(title, *next(iter(found.items()))) for title, found in tuning.items()]
        rows_of_best = [(title, cut, milliseconds([seconds])) for title, cut, seconds in best]
        text += "\n\n" + markdown_table(("low-rank int4", "fastest cut", ""), rows_of_best)
    return text, {"copy_bytes_per_second": bandwidth, "figures": figures, "tuning": tuning}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tune", action="store_true", help="also time other cuts of the lift of keys")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, on the processor if there is no GPU"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    device = torch.device("cpu") if args.tiny and not torch.cuda.is_available() else gpu_or_exit()
    table, figures = run(device, args.rounds, TINY if args.tiny else None, args.tune)
    print(table)
    if args.out:
        gpu = describe_gpu(device) if device.type == "cuda" else {}
        write_json(args.out, {"benchmark": "low_rank_gpu", "gpu": gpu, **figures})


if __name__ == "__main__":
    main()
