# SPDX-License-Identifier: Apache-2.0
"""Many sessions on one engine: throughput and latency through the scheduler, against one at a time.

    python benchmarks/serving.py --scratch DIR --out serving.json            # 0.5b, random int4 weights
    python benchmarks/serving.py --model gui-tiny

Each client sends one request after the other, with a text prompt of its own. Concurrencies take turns within
each round, in one process on one engine.
"""

import argparse
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import report
from peers_shapes import SIZES
from trajectory import random_engine, tiny_engine

from starkv.methods.names import FULL
from starkv.runtime.agent import Agent
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.serving.limits import SchedulerLimits
from starkv.runtime.serving.requests import Event, Failed, Finished, GenerationRequest, TextPiece
from starkv.runtime.serving.scheduler import Scheduler


@dataclass
class Load:
    """What a number of clients measured."""

    clients: int
    tokens: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """Seconds of whole replies."""
    first: list[float] = field(default_factory=list)
    """Seconds to the first text."""

    @property
    def throughput(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds

    @property
    def figures(self) -> dict[str, object]:
        return {
            "clients": self.clients,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.throughput,
            "latency_seconds": self.latencies,
            "first_text_seconds": self.first,
        }


class Client(threading.Thread):
    """Sends so many requests, one after the other."""

    def __init__(self, scheduler: Scheduler, load: Load, number: int, requests: int, words: int, tokens: int):
        super().__init__()
        self._scheduler, self._load, self._number = scheduler, load, number
        self._requests, self._words, self._tokens = requests, words, tokens

    def run(self) -> None:
        for count in range(self._requests):
            self._ask(" ".join(f"{self._number}.{count}.{word}" for word in range(self._words)))

    def _ask(self, text: str) -> None:
        over, started, first = threading.Event(), time.perf_counter(), []
        request = GenerationRequest(
            [{"role": "user", "content": text}], (), SamplingParameters(self._tokens), KvPolicy(FULL)
        )

        def listen(event: Event) -> None:
            if isinstance(event, TextPiece) and not first:
                first.append(time.perf_counter() - started)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                self._load.tokens += event.timings.generated_tokens
                self._load.latencies.append(time.perf_counter() - started)
                self._load.first.extend(first)
                over.set()

        self._scheduler.submit(request, listen)
        if not over.wait(600):
            raise TimeoutError("a reply did not end within ten minutes")


def measure(agent: Agent, loads: list[Load], rounds: int, requests: int, words: int, tokens: int) -> None:
    """Let each number of clients send the same number of requests, in turns."""
    most = max(load.clients for load in loads)
    scheduler = Scheduler(agent.engine, agent.tokenizer, SchedulerLimits(slots=most, queue=4 * most))
    try:
        Client(scheduler, Load(1), 999, 1, words, 4).run()
        for number in range(rounds):
            for load in loads:
                share = requests // load.clients
                clients = [Client(scheduler, load, one, share, words, tokens) for one in range(load.clients)]
                started = time.perf_counter()
                for client in clients:
                    client.start()
                for client in clients:
                    client.join()
                load.seconds += time.perf_counter() - started
                print(f"round {number + 1}: {load.clients} clients done", file=sys.stderr)
    finally:
        scheduler.close(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=["gui-tiny", *SIZES], default="0.5b")
    parser.add_argument("--scratch", type=Path, help="where a random model is kept")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=16, help="of each number of clients, in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--words", type=int, default=8, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of a reply")
    parser.add_argument("--out", type=Path, help="JSON file with all figures")
    args = parser.parse_args()
    if any(args.requests % clients for clients in args.clients):
        parser.error("--requests must be a multiple of each number of clients")
    loads = [Load(clients) for clients in args.clients]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        tiny = args.model == "gui-tiny"
        agent = Agent.load(tiny_engine(scratch) if tiny else random_engine(args.model, scratch))
        measure(agent, loads, args.rounds, args.requests, args.words, args.tokens)
    header = (
        "clients",
        "tokens/s",
        f"against {loads[0].clients}",
        "reply p50",
        "p95",
        "first text p50",
        "p95",
    )
    rows = []
    for load in loads:
        p50, p95 = np.percentile(load.latencies, [50, 95])
        first50, first95 = np.percentile(load.first, [50, 95])
        rows.append(
            (
                f"{load.clients}",
                f"{load.throughput:.1f}",
                f"{load.throughput / loads[0].throughput:.2f}x",
                *(f"{seconds:.2f} s" for seconds in (p50, p95, first50, first95)),
            )
        )
    figures = {
        "model": args.model,
        "reply_tokens": args.tokens,
        "prompt_words": args.words,
        "threads": agent.engine.info.threads,
        "loads": [load.figures for load in loads],
    }
    report([header, *rows], figures, args.out)


if __name__ == "__main__":
    main()
