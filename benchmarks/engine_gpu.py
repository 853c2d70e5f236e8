# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's engine on a GPU: does it say what the processor's says, how fast is it, what does it hold.

    python benchmarks/engine_gpu.py --out results.json

First gui-tiny: logits and actions in bfloat16 and float16 against the float32 engine on the processor, and
with CUDA graphs against without. Then random weights of UI-TARS-1.5-7B's sizes in int4: prefill and decode in
tokens per second, decode's share of what reading all its bytes would allow, and the memory of five 1080p
screenshots with 100, 20 and 5 % of their cache. Last Hugging Face transformers in bfloat16 on the same card,
where it is installed.

Needs onnxruntime-gpu, onnx and onnx-ir. Written on a machine without a GPU.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from engine_gpu_peer import transformers_rates
from gpu_steps import run_command

from starkv.errors import EngineError
from starkv.gpu import find_gpu
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.rows import prompt_rows
from starkv.runtime.agent import Agent
from starkv.runtime.benchmark import Benchmark, decoder_bytes
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.cuda_driver import CudaDevice
from starkv.runtime.engines.ort_cuda import OrtDeviceEngine
from starkv.runtime.engines.ort_cuda_gpu import ready_gpu
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.positions import rope_tables, text_positions
from starkv.validation.report import markdown_table, write_json

ROOT = Path(__file__).resolve().parent.parent
SCREEN, PROMPT = ROOT / "examples" / "screen.png", "Click the red star."
GRID, SCREENS, TEXT_ROWS = (39, 69), 5, 190
"""Image tokens of a 1080p screenshot, how many, and the text around them: 13,645 rows."""
BUDGETS = (1.0, 0.2, 0.05)
DEPTHS = (0, 2048, 13312)
TOLERANCES = {"bfloat16": 0.1, "float16": 0.02}
"""Largest difference of logits, as a share of the largest logit."""


def build(model: str, dtype: str | None, out: Path, *options: str) -> None:
    """``starkv build``."""
    device = ("--device", "cuda", "--compute-dtype", dtype) if dtype else ()
    run_command([sys.executable, "-m", "starkv.cli", "build", model, "--out", str(out), *device, *options])


def prefilled_logits(engine: Any, rows: int = 200) -> np.ndarray:
    """Logits of 1 + 8 steps behind a random prompt."""
    text = engine.manifest.text
    random = np.random.default_rng(0)
    embeds = random.standard_normal((rows + 8, text.hidden)).astype(np.float32) * 0.02
    cos, sin = rope_tables(text_positions(rows + 8).values, text)
    arena, pool = engine.new_arena(rows), engine.new_pool(1, rows + 8)
    results = [engine.prefill(arena, embeds[:rows], Rope(cos[:, :rows], sin[:, :rows]))]
    engine.compress(arena, pool, pool.acquire(), prompt_rows(rows, [], []), KvPolicy())
    for step in range(rows, rows + 8):
        one = slice(step, step + 1)
        results.append(engine.decode(pool, embeds[one], Rope(cos[:, one], sin[:, one]))[0])
    return np.stack(results)


def agreement(scratch: Path) -> list[tuple[str, ...]]:
    """gui-tiny on the GPU against the processor; rows of a table.

    Raises:
        EngineError: they don't agree.
    """
    build("gui-tiny", None, scratch / "tiny", "--quant", "int8")
    processor = Agent.load(scratch / "tiny")
    expected = prefilled_logits(processor.engine)
    action = processor.act(SCREEN, PROMPT, SamplingParameters()).text
    rows, wrong = [], []
    for dtype, tolerance in TOLERANCES.items():
        folder = scratch / f"tiny-{dtype}"
        build("gui-tiny", dtype, folder, "--quant", "int8")
        agent = Agent.load(folder)
        captured = prefilled_logits(agent.engine)
        error = float(np.abs(captured - expected).max() / np.abs(expected).max())
        said = agent.act(SCREEN, PROMPT, SamplingParameters()).text
        graphs = agent.engine.captures_graphs
        agent.engine.stop_capturing()
        same = bool(np.array_equal(prefilled_logits(agent.engine), captured))
        rows.append((dtype, f"{error:.4f}", str(said == action), str(graphs), str(same)))
        if error > tolerance or said != action or (graphs and not same):
            wrong.append(dtype)
    if wrong:
        raise EngineError(
            f"{', '.join(wrong)}: the GPU's engine does not say what the processor's does: {rows}"
        )
    return rows


@contextmanager
def peak_memory(device: CudaDevice) -> Iterator[list[int]]:
    """Highest use of the card's memory in the block, every 20 ms; the list holds it afterwards."""
    peak, done = [device.memory_in_use()], threading.Event()

    def watch() -> None:
        own = CudaDevice()
        while not done.wait(0.02):
            peak[0] = max(peak[0], own.memory_in_use())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def five_screens(engine: OrtDeviceEngine, device: CudaDevice, budget: float, tokens: int) -> dict[str, Any]:
    """Prefill five screenshots, compress them once, decode behind what is kept."""
    text, cells = engine.manifest.text, GRID[0] * GRID[1]
    rows = TEXT_ROWS + SCREENS * cells
    gap = TEXT_ROWS // (SCREENS + 1)
    starts = [gap + index * (cells + gap) for index in range(SCREENS)]
    prompt = prompt_rows(rows, [(start, start + cells) for start in starts], [GRID] * SCREENS, range(4))
    policy = KvPolicy(STAR_KV, Budget(ratio=budget)) if budget < 1 else KvPolicy()
    embeds = np.random.default_rng(0).standard_normal((rows, text.hidden), np.float32) * 0.02
    rope = Rope(*rope_tables(text_positions(rows).values, text))
    seconds = {}
    with peak_memory(device) as peak:
        arena = engine.new_arena(rows)
        pool = engine.new_pool(1, engine.most_kept_rows(rows, policy) + tokens, policy.method)
        started = time.perf_counter()
        engine.prefill(arena, embeds, rope)
        seconds["prefill"] = time.perf_counter() - started
        started = time.perf_counter()
        engine.compress(arena, pool, pool.acquire(), prompt, policy)
        seconds["compress"] = time.perf_counter() - started
        held = pool.kv.bytes_held
        del arena
        steps = []
        for step in range(tokens):
            one = Rope(*rope_tables(text_positions(1, rows + step).values, text))
            started = time.perf_counter()
            engine.decode(pool, embeds[:1], one)
            steps.append(time.perf_counter() - started)
    seconds["decode_step"] = statistics.median(steps)
    return {"budget": budget, "rows": rows, "seconds": seconds, "kv_bytes": held, "peak_bytes": peak[0]}


def real_size(scratch: Path, tokens: int) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Random weights of UI-TARS-1.5-7B."""
    folder = scratch / "7b"
    build("ui-tars-1.5-7b", "bfloat16", folder, "--random-weights", "--quant", "int4")
    device = CudaDevice()
    before = device.memory_in_use()
    engine = OrtDeviceEngine(folder, verify=False)
    bandwidth, at_rest = device.copy_bandwidth(), device.memory_in_use() - before
    benchmark = Benchmark(engine, decoder_bytes(folder), 5)
    tests = list(benchmark.run([512, 2048], [tokens], list(DEPTHS), (1920, 1080)))
    rows = [
        (row.test, f"{row.mean:,.1f} ± {row.deviation:.1f}", _percent(row.roofline_share(bandwidth)))
        for row in tests
    ]
    screens = [five_screens(engine, device, budget, tokens) for budget in BUDGETS]
    for found in screens:
        seconds = found["seconds"]
        rows.append(
            (
                f"five 1080p screenshots, {100 * found['budget']:.0f} % kept",
                f"prefill {seconds['prefill']:.2f} s, compression {1e3 * seconds['compress']:.1f} ms, "
                f"{1 / seconds['decode_step']:.1f} tokens/s",
                f"KV {found['kv_bytes'] / 2**20:,.0f} MiB, "
                f"card {(found['peak_bytes'] - before) / 2**30:.2f} GiB",
            )
        )
    figures = {
        "copy_bytes_per_second": bandwidth,
        "weights_bytes": at_rest,
        "cuda_graphs": engine.captures_graphs,
        "compresses_on_device": engine.compresses_on_device,
        "tests": {row.test: row.rates for row in tests},
        "five_screens": screens,
    }
    return figures, rows


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} % of the copy"


def run(tokens: int = 128, model: bool = True) -> tuple[str, dict[str, Any]]:
    """Everything; a table and the figures."""
    header = ("", "tokens/s", "")
    with tempfile.TemporaryDirectory() as scratch:
        agreed = agreement(Path(scratch))
        table = markdown_table(("gui-tiny", "error", "same action", "CUDA graphs", "same without"), agreed)
        figures: dict[str, Any] = {"gui_tiny": agreed}
        if model:
            figures["7b"], rows = real_size(Path(scratch), tokens)
            figures["transformers"], more = transformers_rates(tokens)
            table += "\n\n" + markdown_table(header, rows + more)
    return table, figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--tiny", action="store_true", help="gui-tiny only")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    args = parser.parse_args()
    gpu = ready_gpu()
    if gpu is None:
        raise SystemExit(f"no GPU that onnxruntime-gpu could use (the driver sees {find_gpu()})")
    printed, found = run(args.tokens, not args.tiny)
    print(printed)
    write_json(args.out, {"benchmark": "engine_gpu", "gpu": gpu.name, **found})
