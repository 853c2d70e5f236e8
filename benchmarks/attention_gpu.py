# SPDX-License-Identifier: Apache-2.0
"""Attention on a GPU: decode against the card's bandwidth, prefill and the vision tower's full attention
against PyTorch's flash attention.

    python benchmarks/attention_gpu.py --out results.json

28 query and 4 KV heads of 128 (the tower: 16 of 80), bfloat16, one layer. Decode reads every key and value
once: its floor is those bytes over the bandwidth of a large copy. Calls rotate among caches that together
don't fit the L2 cache.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_measure import copy_bandwidth, describe_gpu, gpu_or_exit, interleaved, milliseconds, ratio
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from starkv.kernels.attention_call import AttentionCall
from starkv.kernels.cuda_library import KernelLibrary, find_library
from starkv.kernels.full_attention_call import FullAttentionCall
from starkv.validation.attention_checks import AttentionSize, make_call
from starkv.validation.report import markdown_table, write_json

DECODES = ((1, 2_841), (1, 13_605), (8, 2_841), (8, 13_605))
"""Sequences and rows of each."""
PREFILLS = ((2_841, 0), (13_605, 0), (2_701, 13_605))
"""New rows, and rows that are there already."""
IMAGES = (2_116, 10_764)
"""Patches: of 644 x 644 pixels, and of 1080p."""
FLASH = "torch SDPA (flash)"
ROTATED_BYTES = 512 << 20


def decode_figures(
    library: KernelLibrary, sequences: int, rows: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Times of one decode step, and the bytes that it must read."""
    size = AttentionSize("decode", sequences, 1, rows)
    call = make_call(size, torch.bfloat16, device)
    call.kv_len.fill_(rows)
    bytes_read = 2 * sequences * (rows + 1) * size.kv_heads * size.head_dim * 2
    copies = max(2, -(-ROTATED_BYTES // bytes_read))
    calls = [_with_own_cache(call) for _ in range(copies)]
    turns = itertools.cycle(calls)
    out = torch.empty_like(call.q)
    times = interleaved({"CUDA": lambda: library.attention(next(turns), out=out)}, device, rounds)
    return {"seconds": times, "bytes": bytes_read}


def prefill_figures(
    library: KernelLibrary, new: int, history: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Times of one prefill, ours and PyTorch's."""
    call = make_call(AttentionSize("prefill", 1, new, history), torch.bfloat16, device)
    out = torch.empty_like(call.q)
    runners: dict[str, Callable[[], object]] = {"CUDA": lambda: library.attention(call, out=out)}
    if history == 0:
        # With history PyTorch's flash attention aligns its mask at the other corner.
        dim = call.past_k.shape[3]
        runners[FLASH] = flash(call.q, call.k, call.v, dim, is_causal=True, enable_gqa=True)
    return {"seconds": interleaved(runners, device, rounds)}


def image_figures(library: KernelLibrary, patches: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times of full attention among the patches of an image, ours and PyTorch's."""
    heads, dim = 16, 80
    q, k, v = (torch.randn(1, patches, heads * dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    call = FullAttentionCall(q, k, v, heads)
    runners = {"CUDA": lambda: library.full_attention(call), FLASH: flash(q, k, v, dim)}
    return {"seconds": interleaved(runners, device, rounds)}


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dim: int, **options: bool
) -> Callable[[], object]:
    """PyTorch's flash attention on new rows ``[1, S, heads * dim]`` alone."""
    q, k, v = (tensor.view(1, tensor.shape[1], -1, dim).transpose(1, 2) for tensor in (q, k, v))

    def run() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


def _with_own_cache(call: AttentionCall) -> AttentionCall:
    return AttentionCall(call.q, call.k, call.v, call.past_k.clone(), call.past_v.clone(), call.kv_len)


def run(device: torch.device, rounds: int = 50) -> tuple[str, dict[str, Any]]:
    """The whole benchmark: a Markdown table and the figures."""
    library = find_library("cuda")
    if library is None:
        raise SystemExit("no libstarkv_kernels.so: `make plugin` builds it, or STARKV_KERNELS names one")
    bandwidth = copy_bandwidth(device)
    table, figures = [], {}
    for sequences, rows in DECODES:
        result = decode_figures(library, sequences, rows, device, rounds)
        seconds = result["seconds"]["CUDA"]
        result["share_of_copy_bandwidth"] = result["bytes"] / statistics.median(seconds) / bandwidth
        name = f"decode, {sequences} x {rows:,} rows"
        table.append([name, milliseconds(seconds), f"{result['share_of_copy_bandwidth']:.0%} of the copy"])
        figures[name] = result
    for new, history in PREFILLS:
        result = prefill_figures(library, new, history, device, max(10, rounds // 2))
        name = f"prefill, {new:,} after {history:,} rows"
        table.append(_against_flash(name, result, 4 * 28 * 128 * (new * history + new * (new + 1) / 2)))
        figures[name] = result
    for patches in IMAGES:
        result = image_figures(library, patches, device, max(10, rounds // 2))
        name = f"image, {patches:,} patches"
        table.append(_against_flash(name, result, 4 * 16 * 80 * patches**2))
        figures[name] = result
    header = ("one layer", "CUDA", "against")
    return markdown_table(header, table), {"copy_bytes_per_second": bandwidth, "figures": figures}


def _against_flash(name: str, result: dict[str, Any], flops: float) -> list[str]:
    """A row of the table; completes the figures."""
    seconds, against = result["seconds"]["CUDA"], "–"
    result["flops_per_second"] = flops / statistics.median(seconds)
    if peer := result["seconds"].get(FLASH):
        result["times_of_flash"] = ratio(seconds, peer)
        against = f"{result['times_of_flash']:.2f} x flash ({milliseconds(peer)})"
    return [name, f"{milliseconds(seconds)}, {result['flops_per_second'] / 1e12:.0f} TFLOP/s", against]


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
        write_json(args.out, {"benchmark": "attention_gpu", "gpu": describe_gpu(device), **figures})


if __name__ == "__main__":
    main()
