# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of decoding: the engines against Hugging Face transformers, same CPU, same run.

    python benchmarks/decode_speed.py --tokens 64 --rounds 7

Each round times every contender once, so a slow moment of the machine hits all of them; ratios are taken
within a round. Prefill is not counted: it is the time of a long reply minus that of a one-token reply.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Reference, engines, named_clicks, report
from PIL import Image
from transformers import DynamicCache

from starkv.host import usable_processors
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Rope
from starkv.runtime.preprocess.positions import rope_tables, text_positions


def transformers_decode(
    reference: Reference, image: Image.Image, prompt: str, tokens: int
) -> Callable[[], float]:
    """Seconds that ``tokens`` decode steps take: those of ``generate``, without its bookkeeping."""
    inputs = reference.inputs(image, prompt)

    @torch.inference_mode()
    def run() -> float:
        cache = DynamicCache(config=reference.model.config.get_text_config())
        step = reference.model(**inputs, past_key_values=cache, use_cache=True)
        position = inputs["input_ids"].shape[1]
        started = time.perf_counter()
        for index in range(tokens):
            step = reference.model(
                input_ids=step.logits[:, -1:].argmax(-1),
                position_ids=torch.full((3, 1, 1), position + index),
                past_key_values=step.past_key_values,
                use_cache=True,
            )
        return time.perf_counter() - started

    return run


def engine_decode(agent: Agent, rows: int, tokens: int) -> Callable[[], float]:
    """Seconds that ``tokens`` decode steps behind ``rows`` rows take."""
    engine = agent.engine
    text = engine.manifest.text
    pool = engine.new_pool(1, rows + tokens)
    pool.acquire()

    def run() -> float:
        pool.kv.lengths[:] = rows
        token = 0
        started = time.perf_counter()
        for index in range(tokens):
            rope = Rope(*rope_tables(text_positions(1, rows + index).values, text))
            token = int(engine.decode(pool, engine.embed([token]), rope)[0].argmax())
        return time.perf_counter() - started

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    torch.set_num_threads(usable_processors())

    reference = Reference()
    (question,) = named_clicks("test", 1)
    image = Image.fromarray(question.frames[0])
    rows = reference.inputs(image, question.question)["input_ids"].shape[1]
    seconds: dict[str, list[float]] = {}
    with engines("fp32", "int8", "int4") as directories:
        contenders = {
            "transformers fp32": transformers_decode(reference, image, question.question, args.tokens)
        }
        for name, directory in directories.items():
            contenders[f"starkv {name}"] = engine_decode(Agent.load(directory), rows, args.tokens)
        for index in range(args.rounds + 1):
            for name, run in contenders.items():
                taken = run()
                if index:  # the first round warms up
                    seconds.setdefault(name, []).append(taken)

    base = seconds["transformers fp32"]
    table = [("decode", "tokens/s, median", "times transformers, median of rounds")]
    figures = {}
    for name, taken in seconds.items():
        rate = args.tokens / statistics.median(taken)
        ratio = statistics.median(b / t for b, t in zip(base, taken, strict=True))
        figures[name] = {"tokens_per_second": rate, "ratio": ratio, "seconds": taken}
        table.append((name, f"{rate:.0f}", f"{ratio:.2f}"))
    report(
        table,
        {"benchmark": "decode_speed", "tokens": args.tokens, "rows": rows, "figures": figures},
        args.out,
    )


if __name__ == "__main__":
    main()
