# SPDX-License-Identifier: Apache-2.0
"""Time of one prompt's compression at the shape of UI-TARS-1.5-7B, against the official code, in one run.

    python benchmarks/compress.py --official path/to/STaR-KV --prefill --out results.json

28 layers, 28 query and 4 KV heads of 128, float32, budget 20 %, random keys and queries; one 1080p screenshot
(39 x 69 tokens, 2,841 rows) and five (13,605 rows). A round compresses all layers once with each
implementation; rounds alternate between them, so that a slow moment of the machine hits all alike. Ratios are
medians over rounds.

The official code is loaded from the reader's own checkout (its licence, CC BY-NC, does not let us ship it).
It gets the repeated heads that it wants; repeating them is not timed. ``--prefill`` also times the prefill of
two layers with random int4 weights of that shape, for the share that compression has in it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import report
from official_code import official_clusters
from rich.console import Console
from rich.progress import track
from wide_model import TEXT, prefill_seconds

from starkv.export.compress import write_compress_graphs
from starkv.host import usable_processors
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.prefill import Prefill
from starkv.methods.rows import PromptRows, prompt_rows
from starkv.methods.select import compact, select_rows
from starkv.methods.star_kv import kept_per_layer, score
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_request import request_star_kv
from starkv.methods.star_kv_state import StarKVState
from starkv.runtime.engines.ort_compress import OrtCompressor
from starkv.runtime.kv.buffers import Arena, KvBuffers, Pool
from starkv.runtime.kv.policy import KvPolicy, StarKVMemory

GRID, BETWEEN, BUDGET = (39, 69), 10, 0.2
HIDDEN = TEXT.hidden


def prompt_of(screenshots: int) -> PromptRows:
    """A prompt as UI-TARS makes it: system prompt, instruction, screenshots, generation prompt."""
    cells, spans, row = GRID[0] * GRID[1], [], 90
    for _ in range(screenshots):
        spans.append((row, row + cells))
        row += cells + BETWEEN
    return prompt_rows(row + 50, spans, [GRID] * screenshots, range(90))


def filled_arena(prompt: PromptRows, window: int) -> Arena:
    """An arena with random content."""
    random = np.random.default_rng(0)
    arena = Arena.allocate(TEXT, prompt.length)
    for buffer in (arena.kv.keys, arena.kv.values):
        for layer in buffer:
            layer[:] = random.standard_normal(layer.shape, np.float32)
    arena.kv.lengths[:] = prompt.length
    arena.hidden_norm[:] = 1.0 + random.random(arena.hidden_norm.shape, np.float32)
    arena.q_window = random.standard_normal((TEXT.layers, 1, TEXT.heads, window, TEXT.head_dim), np.float32)
    return arena


@dataclass
class Case:
    """One prompt and window."""

    prompt: PromptRows
    window: int
    arena: Arena

    @property
    def kept(self) -> int:
        return Budget(BUDGET).rows(self.prompt.length)


def ort_runner(case: Case, config: StarKVConfig, graphs: Path) -> tuple[Callable[[], None], Pool]:
    """STaR-KV in ONNX Runtime, as the engine calls it."""

    def open_graph(name: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_processors()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(graphs / f"{name}.onnx", options)

    compressor = OrtCompressor(TEXT, case.window, open_graph)
    policy = KvPolicy(STAR_KV, Budget(BUDGET), config)
    pool = Pool(KvBuffers.allocate(TEXT, 1, compressor.most_rows(case.prompt.length, policy)))
    pool.acquire()
    memory: list[StarKVMemory | None] = [None]

    def run() -> None:
        memory[0] = compressor.compress(case.arena, pool, 0, case.prompt, policy, memory[0]).memory

    return run, pool


def torch_runner(case: Case, config: StarKVConfig) -> Callable[[], None]:
    """The PyTorch reference, one layer after the other: what all of them need lies in the processor's
    cache."""
    state = [StarKVState.initial(1, 1, TEXT.kv_heads) for _ in range(TEXT.layers)]

    def run() -> None:
        kept = case.kept
        request = request_star_kv(config, case.prompt, kept, state[0].progress, case.window)
        marked = torch.from_numpy(request.prompt.marked(request.protected))[None, None]
        scored, prefills = [], []
        for layer in range(TEXT.layers):
            one, rows = slice(layer, layer + 1), slice(0, case.prompt.length)
            prefill = Prefill(
                keys=torch.from_numpy(case.arena.kv.keys[one, :, :, rows]),
                values=torch.from_numpy(case.arena.kv.values[one, :, :, rows]),
                queries=torch.from_numpy(case.arena.q_window[one]),
                hidden_norm=torch.from_numpy(case.arena.hidden_norm[one, :, rows]),
                kv_len=torch.full((1, 1), case.prompt.length),
                row_meta=marked,
                frame=request.frame,
                window=case.window,
            )
            scores, state[layer] = score(prefill, state[layer], config)
            scored.append((scores.entropy, scores.priorities))
            prefills.append(prefill)
        entropy = torch.cat([entropy for entropy, _ in scored])
        past = torch.full_like(entropy, case.prompt.length - case.window)
        keep = kept_per_layer(entropy, past, case.window, request.limits)
        for layer, prefill in enumerate(prefills):
            own = keep[layer : layer + 1]
            compact(prefill, select_rows(scored[layer][1], own, request.most_rows), own)

    return run


def official_runner(case: Case, checkout: Path) -> Callable[[], None]:
    """``STARKVGroupCluster.update_kv`` of the official code, a cluster with its own state per layer."""
    sharing, spans, length = TEXT.heads // TEXT.kv_heads, case.prompt.spans, case.prompt.length
    clusters = official_clusters(checkout, TEXT.layers, spans, case.window, case.kept)
    # One layer's repeated heads serve all layers: 28 of them would need 11 GB at five screenshots, and they
    # are far larger than any cache in any case.
    keys, values = (
        torch.from_numpy(buffer[0, :, :, :length]).repeat_interleave(sharing, 1)
        for buffer in (case.arena.kv.keys, case.arena.kv.values)
    )
    queries = torch.zeros(1, TEXT.heads, length, TEXT.head_dim)
    queries[:, :, -case.window :] = torch.from_numpy(case.arena.q_window[0])
    hidden = torch.randn(1, length, HIDDEN)

    def run() -> None:
        for cluster in clusters:
            cluster.update_kv(keys, queries, values, None, sharing, hidden_states=hidden)

    return run


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cases() -> Iterator[tuple[str, Case]]:
    for screenshots in (1, 5):
        for window in (8, 64):
            prompt = prompt_of(screenshots)
            name = f"{screenshots} x 1080p, {prompt.length:,} rows, W {window}"
            yield name, Case(prompt, window, filled_arena(prompt, window))


@torch.no_grad()
def measure(case: Case, checkout: Path | None, rounds: int, graphs: Path, label: str) -> dict[str, Any]:
    """Seconds of every implementation in every round, and the bytes that the caches hold."""
    wide = {"native": StarKVConfig(), "official": StarKVConfig.official()}
    wide = {name: replace(config, window=case.window) for name, config in wide.items()}
    runners: dict[str, Callable[[], None]] = {}
    held: dict[str, float] = {}
    for mode, config in wide.items():
        runners[f"torch {mode}"] = torch_runner(case, config)
        runners[f"ort {mode}"], pool = ort_runner(case, config, graphs)
        runners[f"ort {mode}"]()
        held[mode] = pool.kv.bytes_held / case.arena.kv.bytes_held
    if checkout:
        runners["official code"] = official_runner(case, checkout)
    for run in runners.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in track(range(rounds), label, console=Console(stderr=True)):
        for name, run in runners.items():
            times[name].append(seconds(run))
    return {"seconds": times, "bytes_held_of_full": held, "budget_of_full": case.kept / case.prompt.length}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, help="checkout of the official STaR-KV repository")
    parser.add_argument("--prefill", action="store_true", help="also time the prefill of two layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    torch.set_num_threads(usable_processors())

    columns = ("official code", "torch official", "torch native", "ort official", "ort native")
    table = [("one prompt, 28 layers", *columns, "bytes held", "ort native of prefill")]
    figures: dict[str, Any] = {}
    prefills: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_compress_graphs(Path(scratch), TEXT)
        for name, case in cases():
            result = measure(case, args.official, args.rounds, Path(scratch), name)
            times = result["seconds"]
            cells = []
            for column in columns:
                if column not in times:
                    cells.append("–")
                    continue
                cell = f"{1e3 * statistics.median(times[column]):,.0f} ms"
                if column != "official code" and args.official:
                    ratios = [a / b for a, b in zip(times["official code"], times[column], strict=True)]
                    result.setdefault("times_official", {})[column] = statistics.median(ratios)
                    cell += f" ({statistics.median(ratios):.1f}x)"
                cells.append(cell)
            share = "–"
            if args.prefill:
                rows = case.prompt.length
                if rows not in prefills:
                    prefills[rows] = prefill_seconds(rows, Path(scratch))
                result["prefill_seconds"] = prefills[rows]
                part = statistics.median(times["ort native"]) / prefills[rows]
                share = f"{part:.2%}"
            figures[name] = result
            held = f"{result['bytes_held_of_full']['native']:.4f} of full"
            table.append((name, *cells, held, share))
    report(table, {"benchmark": "compress", "rounds": args.rounds, "figures": figures}, args.out)


if __name__ == "__main__":
    main()
