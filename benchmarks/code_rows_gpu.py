# SPDX-License-Identifier: Apache-2.0
"""Kept rows into codes and codes into rows on a GPU, against the card's copy bandwidth.

    python benchmarks/code_rows_gpu.py --out results.json

The shape of UI-TARS-1.5-7B in bfloat16: 28 layers of 4 KV heads of 128, with the 2,721 rows that 20 % of five
1080p screenshots leave, and with all 13,605. One call does all layers. The card's caches are overwritten
before each call. The codes and rows of the very calls that are timed are compared with the PyTorch reference
first.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_measure import copy_bandwidth, describe_gpu, gpu_or_exit, interleaved_cold, milliseconds
from gpu_steps import StepError

from starkv.kernels.code_rows_call import CodeRowsCall
from starkv.kernels.code_rows_reference import reference_dequantize_rows, reference_quantize_rows
from starkv.kernels.cuda_library import KernelLibrary, find_library
from starkv.validation.code_rows_calls import CodeRowsSize, make_code_rows_call
from starkv.validation.report import markdown_table, write_json

LAYERS = 28
DTYPE = torch.bfloat16
SIZES = {
    f"{rows:,}": CodeRowsSize((rows,) * LAYERS, rows, rows, slots=1, slot=0, table_rows=32_768)
    for rows in (2_721, 13_605)
}


def bytes_moved(call: CodeRowsCall) -> int:
    """Least that one call must read and write: rows, their codes and their positions."""
    _, _, groups, _, dim = call.k.shape
    position = 3 * call.positions.element_size()
    of_row = 2 * groups * dim * call.k.element_size() + 2 * groups * dim * call.bits // 8 + position
    return int(call.lengths.sum()) * of_row


def check(library: KernelLibrary, call: CodeRowsCall) -> None:
    """Both directions against the reference; the call has the codes of its rows and the rows of those codes.

    Raises:
        StepError: they are not the reference's.
    """
    k_codes, v_codes, _ = reference_quantize_rows(call)
    wrong_rows = library.quantize_rows(call)
    same_codes = torch.equal(call.k_codes, k_codes) and torch.equal(call.v_codes, v_codes)
    k, v = reference_dequantize_rows(call)
    library.dequantize_rows(call)
    same_rows = torch.equal(call.k, k) and torch.equal(call.v, v)
    if not (same_codes and same_rows) or wrong_rows.any():
        raise StepError(
            f"{call.bits} bits: same codes: {same_codes}, same rows: {same_rows}, "
            f"wrong rows: {int(wrong_rows.sum())}"
        )


def run(
    library: KernelLibrary,
    device: torch.device,
    rounds: int = 50,
    sizes: dict[str, CodeRowsSize] = SIZES,
    copy_bytes: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """The whole benchmark: a Markdown table and the figures.

    Args:
        library: the kernels.
        device: where.
        rounds: how often each call is timed.
        sizes: of the calls, by what they are called; 8 bits and 4 bits of each.
        copy_bytes: size of the copy that bandwidths are compared with; None for the usual one.

    Raises:
        StepError: codes or rows are not the reference's.
    """
    bandwidth = copy_bandwidth(device, copy_bytes) if copy_bytes else copy_bandwidth(device)
    table, figures = [], {}
    for name, size in sizes.items():
        for bits in (8, 4):
            call = make_code_rows_call(replace(size, bits=bits), DTYPE, device)
            check(library, call)
            runners = {
                "quantize": lambda call=call: library.quantize_rows(call),
                "dequantize": lambda call=call: library.dequantize_rows(call),
            }
            moved = bytes_moved(call)
            for direction, seconds in interleaved_cold(runners, device, rounds).items():
                share = moved / statistics.median(seconds) / bandwidth
                figures[f"{direction}, {name} rows, {bits} bits"] = {
                    "seconds": seconds,
                    "bytes": moved,
                    "share_of_copy_bandwidth": share,
                }
                table.append(
                    (name, direction, f"{bits} bits", milliseconds(seconds), f"{share:.0%} of the copy")
                )
    header = ("rows", "", "codes", "all layers", "bandwidth")
    return markdown_table(header, table), {"copy_bytes_per_second": bandwidth, "figures": figures}


def cuda_library() -> KernelLibrary:
    """The GPU's library; ends the program with a message where there is none."""
    library = find_library("cuda")
    if library is None:
        raise SystemExit("no libstarkv_kernels.so: `make plugin` builds it, or STARKV_KERNELS names one")
    return library


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    device = gpu_or_exit()
    table, figures = run(cuda_library(), device, args.rounds)
    print(table)
    if args.out:
        write_json(args.out, {"benchmark": "code_rows_gpu", "gpu": describe_gpu(device), **figures})


if __name__ == "__main__":
    main()
