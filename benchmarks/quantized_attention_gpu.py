# SPDX-License-Identifier: Apache-2.0
"""One token's attention to a cache of 8-bit and 4-bit codes on a GPU, against one of bfloat16, in one run.

    python benchmarks/quantized_attention_gpu.py --out results.json

28 query and 4 KV heads of 128, one layer, one sequence of 8,192, 32,768 and 131,072 rows whose positions are
those of screenshots. Each cache has copies that together don't fit the L2 cache, and calls rotate among them;
rounds alternate between the three. Outputs and codes of the very calls that are timed are compared with the
PyTorch reference first.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_measure import copy_bandwidth, describe_gpu, gpu_or_exit, interleaved, milliseconds, ratio
from gpu_steps import StepError

from starkv.kernels.attention_call import AttentionCall
from starkv.kernels.cuda_library import KernelLibrary, find_library
from starkv.kernels.quantized_attention_reference import reference_quantized_attention
from starkv.validation.attention_checks import AttentionSize, make_call
from starkv.validation.quantized_calls import QuantizedSize, make_quantized_call
from starkv.validation.quantized_checks import TOLERANCE
from starkv.validation.report import markdown_table, write_json

ROWS = (8_192, 32_768, 131_072)
TABLE_ROWS = 32_768
DTYPE = torch.bfloat16
ROTATED_BYTES = 512 << 20
BASELINE = "bfloat16"


def floating_runner(
    library: KernelLibrary, rows: int, device: torch.device
) -> tuple[Callable[[], object], int]:
    """``KVAttention`` on rotating caches, and the bytes that one call must read."""
    size = AttentionSize("decode", 1, 1, rows)
    call = make_call(size, DTYPE, device)
    call.kv_len.fill_(rows)
    bytes_read = 2 * (rows + 1) * size.kv_heads * size.head_dim * call.q.element_size()
    calls = [
        AttentionCall(call.q, call.k, call.v, call.past_k.clone(), call.past_v.clone(), call.kv_len)
        for _ in range(_copies(bytes_read))
    ]
    turns, out = itertools.cycle(calls), torch.empty_like(call.q)
    return (lambda: library.attention(next(turns), out=out)), bytes_read


def quantized_runner(
    library: KernelLibrary, rows: int, bits: int, device: torch.device
) -> tuple[Callable[[], object], int, float]:
    """``QuantizedKVAttention`` on rotating caches, the bytes that one call must read, and its error.

    Raises:
        StepError: codes or output are not the reference's.
    """
    size = QuantizedSize((rows,), rows + 64, bits, table_rows=TABLE_ROWS)
    call = make_quantized_call(size, DTYPE, device)
    expected = reference_quantized_attention(call)
    own = replace(call, past_k=call.past_k.clone(), past_v=call.past_v.clone())
    result = library.quantized_attention(own)
    error = float((result[0].double() - expected[0]).norm() / expected[0].norm())
    same_codes = all(torch.equal(ours, theirs) for ours, theirs in zip(result[1:], expected[1:], strict=True))
    if not (same_codes and error <= TOLERANCE[DTYPE]):
        raise StepError(f"{rows:,} rows of {bits} bits: error {error:.1e}, same codes: {same_codes}")
    bytes_read = (rows + 1) * (2 * size.kv_heads * size.head_dim * bits // 8 + 12)
    calls = [
        replace(call, past_k=call.past_k.clone(), past_v=call.past_v.clone())
        for _ in range(_copies(bytes_read))
    ]
    turns, out = itertools.cycle(calls), torch.empty_like(call.q)
    return (lambda: library.quantized_attention(next(turns), out=out)), bytes_read, error


def _copies(bytes_read: int) -> int:
    return max(2, -(-ROTATED_BYTES // bytes_read))


def run(device: torch.device, rounds: int = 50) -> tuple[str, dict[str, Any]]:
    """The whole benchmark: a Markdown table and the figures.

    Raises:
        StepError: codes or output are not the reference's.
    """
    library = find_library("cuda")
    if library is None:
        raise SystemExit("no libstarkv_kernels.so: `make plugin` builds it, or STARKV_KERNELS names one")
    bandwidth = copy_bandwidth(device)
    table, figures = [], {}
    for rows in ROWS:
        work, bytes_read = floating_runner(library, rows, device)
        runners, sizes, errors = {BASELINE: work}, {BASELINE: bytes_read}, {}
        for bits in (8, 4):
            name = f"{bits} bits"
            runners[name], sizes[name], errors[name] = quantized_runner(library, rows, bits, device)
        seconds = interleaved(runners, device, rounds)
        of_rows: dict[str, Any] = {}
        for name, times in seconds.items():
            share = sizes[name] / statistics.median(times) / bandwidth
            faster = ratio(seconds[BASELINE], times)
            of_rows[name] = {
                "seconds": times,
                "bytes": sizes[name],
                "share_of_copy_bandwidth": share,
                "times_faster_than_bfloat16": faster,
                "error": errors.get(name),
            }
            cells = (f"{rows:,}", name, milliseconds(times), f"{faster:.2f} x", f"{share:.0%} of the copy")
            table.append(cells)
        figures[str(rows)] = of_rows
    header = ("rows", "cache", "one layer", "as fast as bfloat16", "bandwidth")
    return markdown_table(header, table), {"copy_bytes_per_second": bandwidth, "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    device = gpu_or_exit()
    table, figures = run(device, args.rounds)
    print(table)
    if args.out:
        write_json(args.out, {"benchmark": "quantized_attention_gpu", "gpu": describe_gpu(device), **figures})


if __name__ == "__main__":
    main()
