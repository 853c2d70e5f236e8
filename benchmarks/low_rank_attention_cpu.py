# SPDX-License-Identifier: Apache-2.0
"""What a decode step's attention costs per layer on a CPU: low-rank and quantized caches against a dense one.

    python benchmarks/low_rank_attention_cpu.py --rows 1632 --rounds 20 --out FILE
    python benchmarks/low_rank_attention_cpu.py --shape gqa mha --rows 8192 32768 131072 --layers 4 --out FILE

gqa: 28 query and 4 KV heads of 128 channels, as in UI-TARS-1.5-7B; mha: 32 of both, as in LLaMA-2-7B. One
sequence, random numbers, rows at the positions of consecutive 1080p screenshots' cells. Dense is ONNX
Runtime's GroupQueryAttention in float32 over as many rows as the low-rank cache has packed and raw ones
together. Quantized caches come twice: the same operator alone, given the key bias's part of the logits, and
a layer as an engine runs it, which works that part out, too.

Each implementation walks over layers with caches of their own, at least one and as many as --memory holds,
by turns with the dense one, so that none finds its cache in the processor's. Times are medians of rounds,
ratios medians of each round's ratio. 32,768 rows of mha take 4 GB of memory, most of it keys that low rank
lifts, and 131,072 four times as much.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from common import report
from low_rank_cpu_cases import DENSE, SHAPES, STORAGES, Case, Heads, dense_case, low_rank_case
from low_rank_cpu_layer import packed_layer_case

from starkv.runtime.engines.ort_binding import bind_array

GIB = 2**30
HEADER = ("shape", "rows", "cache", "bytes a row and layer", "ms a layer", "times dense")


class Layers:
    """One implementation's session and the bound caches of several layers."""

    def __init__(self, case: Case, rows: int, layers: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(case.model, options, providers=["CPUExecutionProvider"])
        # What is bound is their memory.
        self.inputs = [case.inputs(np.random.default_rng(layer), rows) for layer in range(layers)]
        self._bindings = []
        for arrays in self.inputs:
            binding = self._session.io_binding()
            for name, array in arrays.items():
                bind_array(binding.bind_input, name, array)
            binding.bind_output("out")
            for output, name in case.in_place.items():
                bind_array(binding.bind_output, output, arrays[name])
            self._bindings.append(binding)

    def step(self) -> float:
        """Milliseconds per layer."""
        start = time.perf_counter()
        for binding in self._bindings:
            self._session.run_with_iobinding(binding)
        return (time.perf_counter() - start) * 1e3 / len(self._bindings)

    def output(self) -> np.ndarray:
        """``[1, 1, Hq * D]`` of the first layer's last step."""
        found: np.ndarray = self._bindings[0].get_outputs()[0].numpy()
        return found


def cases(heads: Heads) -> list[Case]:
    """All caches but the dense one: quantized, and low rank at half and a quarter of the ranks."""
    quantized = [make(heads, bits) for bits in (8, 4) for make in (dense_case, packed_layer_case)]
    low_rank = [low_rank_case(heads, *form) for form in itertools.product(heads.ranks, STORAGES)]
    return quantized + low_rank


def fitting_layers(case: Case, rows: int, layers: int, memory: float) -> int:
    """As many of the layers as fit so many GiB, but one at least."""
    return max(1, min(layers, int(memory * GIB / (rows * case.row_bytes))))


def measure(
    heads: Heads, rows: int, layers: int, rounds: int, threads: int, memory: float
) -> dict[str, dict[str, float]]:
    """Figures of every cache, the dense one's first.

    Args:
        rows: of the cache, the new one among them.
        layers: with caches of their own, if they fit.
        memory: GiB for the caches of one implementation.
    """

    def made(case: Case) -> Layers:
        return Layers(case, rows, fitting_layers(case, rows, layers, memory), threads)

    reference = dense_case(heads, 32)
    dense, dense_times = made(reference), []
    figures: dict[str, dict[str, float]] = {
        DENSE: {"bytes_per_row": reference.row_bytes, "milliseconds": 0.0, "times_dense": 1.0}
    }
    for case in cases(heads):
        print(f"{rows:,} rows: {case.name}", file=sys.stderr, flush=True)
        # One at a time: at 128k rows a layer takes gigabytes.
        own = made(case)
        for system in (dense, own):
            system.step()
        times = np.array([(dense.step(), own.step()) for _ in range(rounds)])
        if not np.isfinite(own.output()).all():
            raise ValueError(f"{case.name} gives no numbers")
        dense_times.extend(times[:, 0])
        figures[case.name] = {
            "bytes_per_row": case.row_bytes,
            "milliseconds": float(np.median(times[:, 1])),
            "times_dense": float(np.median(times[:, 1] / times[:, 0])),
        }
    figures[DENSE]["milliseconds"] = float(np.median(dense_times))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["gqa"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1632], help="of the cache")
    parser.add_argument("--layers", type=int, default=14, help="with caches of their own, if they fit")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.5, help="GiB for one implementation's caches")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tail = max(SHAPES[name].tail for name in arguments.shape)
    if min(arguments.rows) <= tail:
        parser.error(f"--rows must be more than {tail}, which a low-rank cache keeps raw")
    settings = {name: getattr(arguments, name) for name in ("layers", "rounds", "threads", "memory")}
    table: list[tuple[str, ...]] = [HEADER]
    found: dict[str, Any] = {}
    for name, rows in itertools.product(arguments.shape, arguments.rows):
        figures = measure(SHAPES[name], rows, **settings)
        found.setdefault(name, {})[str(rows)] = figures
        for cache, own in figures.items():
            numbers = f"{own['bytes_per_row']:.0f}", f"{own['milliseconds']:.2f}", f"{own['times_dense']:.2f}"
            table.append((name, f"{rows:,}", cache, *numbers))
    report(table, settings | {"shapes": found}, arguments.out)


if __name__ == "__main__":
    main()
