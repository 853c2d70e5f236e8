# SPDX-License-Identifier: Apache-2.0
"""What stream mode costs in accuracy: trajectory questions asked as whole prompts and piece by piece.

    python benchmarks/stream_accuracy.py --minutes 12 --out stream-accuracy.json

Each question of the synthetic trajectory task has three to five screenshots and then its text. Prompt mode
sees all of it and compresses once, with the question in sight. A stream gets one screenshot after the other
and compresses within the same budget each time, as an agent that goes on for hours must, so rows are chosen
before it is known what they will be good for:

* stream: the question comes with the last screenshot;
* stream, told before: earlier screenshots are compressed under the question's attention too, as where an
  agent's task is known from the start; the question's rows go again, so that the prompt stays the same;
* stream, asked apart: the question comes after the last screenshot was compressed.

Pieced together, tokens and positions are those of the whole prompt, which is checked for every question. In
prompt mode STaR-KV remembers an episode's earlier questions, in a stream its earlier screenshots.

Each stream is asked twice: with the newest screenshot whole until the next one was read behind it, and with
it compacted at once.
"""

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from common import engines, report
from stream_asking import STREAMS, StreamAsker, Way

from starkv.evaluation.answers import answer_of
from starkv.evaluation.boxes import Box
from starkv.evaluation.graders.point import click_in_box
from starkv.evaluation.paired import Discordance, cluster_intervals, holm
from starkv.evaluation.statistics import wilson_interval
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.runtime.agent import Agent, interpret
from starkv.runtime.kv.policy import KvPolicy, StarKVMemory
from starkv.runtime.timings import Timings
from starkv.synthetic.samples import Sample
from starkv.synthetic.suite import SPLITS, TRAJECTORY_TASKS, trajectory_samples

LONGEST_REPLY = 48
"""Tokens."""
WHOLE = 1.0
"""Budget that stands for the full cache."""


class Asked(NamedTuple):
    """A question that was asked."""

    id: str
    group: str
    """Its episode."""
    task: str


@dataclass
class Cell:
    """One way at one budget, over all questions."""

    way: Way
    budget: float
    newest_whole: bool = True
    """Of a stream, see ``Session``."""
    hits: list[bool] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    """Share of the prompt's rows behind which the reply was decoded."""
    parked: list[float] = field(default_factory=list)
    """Share of the prompt's rows that a stream held before the question."""
    texts: list[str] = field(default_factory=list)

    @property
    def policy(self) -> KvPolicy:
        return KvPolicy(FULL) if self.budget == WHOLE else KvPolicy(STAR_KV, Budget(self.budget))

    def ask(self, agent: Agent, asker: StreamAsker, episode: Sequence[Sample], number: int) -> None:
        """Ask an episode's question; in prompt mode STaR-KV remembers those before."""
        sample = episode[number]
        if not number:
            self._memory: StarKVMemory | None = None
        reply = asker.ask(sample, self.way, self.policy, self._memory, self.newest_whole)
        if self.way == "prompt":
            self._memory = reply.memory
        manifest = agent.engine.manifest
        read = interpret(reply.text, manifest, asker.seen(sample), Timings(), "stop")
        box = Box(*map(float, sample.box))
        self.hits.append(bool(click_in_box(answer_of(read, manifest.coordinates), box)))
        self.kept.append(reply.kept / reply.full)
        self.parked.append(reply.parked / reply.full)
        self.texts.append(reply.text)

    def extend(self, more: "Cell") -> None:
        """Add another episode's answers."""
        self.hits += more.hits
        self.kept += more.kept
        self.parked += more.parked
        self.texts += more.texts


def cells_of(budgets: Sequence[float]) -> list[Cell]:
    """All cells: without eviction the kinds of streams are one."""
    whole: list[Way] = ["prompt", "stream"]
    cells = [Cell(way, WHOLE) for way in whole] + [Cell("prompt", budget) for budget in budgets]
    return cells + [Cell(way, b, newest) for newest in (True, False) for way in STREAMS for b in budgets]


@lru_cache(maxsize=1)
def opened(engine: Path) -> Agent:
    """The engine, once per process."""
    return Agent.load(engine, threads=1)


def answers(engine: Path, episode: Sequence[Sample], budgets: Sequence[float]) -> list[Cell]:
    """Ask an episode's questions."""
    agent, cells = opened(engine), cells_of(budgets)
    asker = StreamAsker(agent, LONGEST_REPLY)
    for number in range(len(episode)):
        for cell in cells:
            cell.ask(agent, asker, episode, number)
    return cells


def run(
    engine: Path, samples: Iterable[Sample], budgets: Sequence[float], jobs: int, minutes: float
) -> tuple[list[Cell], list[Asked]]:
    """Ask whole episodes until there are no more or the time is up; returns answers and what was asked."""
    cells, asked, end = cells_of(budgets), list[Asked](), time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        pending: deque[Future[list[Cell]]] = deque()

        def collect() -> None:
            for cell, more in zip(cells, pending.popleft().result(), strict=True):
                cell.extend(more)
            print(f"{len(cells[0].hits)} questions", file=sys.stderr, end="\r", flush=True)

        # Episodes are drawn as they are needed: all screenshots of a thousand questions are a gigabyte.
        for _, some in groupby(samples, key=lambda sample: sample.group):
            if time.monotonic() > end:
                break
            episode = list(some)
            asked += [Asked(sample.id, sample.group, sample.task) for sample in episode]
            pending.append(pool.submit(answers, engine, episode, budgets))
            if len(pending) > jobs:
                collect()
        while pending:
            collect()
    return cells, asked


def figures_of(cells: Sequence[Cell], samples: Sequence[Asked]) -> list[dict[str, object]]:
    """Accuracy of each cell, in all and by task, and of streams the paired difference to prompt mode."""
    prompts = {cell.budget: cell for cell in cells if cell.way == "prompt"}
    streams = [cell for cell in cells if cell.way != "prompt"]
    splits = [Discordance.of(cell.hits, prompts[cell.budget].hits) for cell in streams]
    adjusted = holm([split.p_value for split in splits])
    differences = np.array(
        [np.subtract(cell.hits, prompts[cell.budget].hits, dtype=np.float64) for cell in streams]
    )
    intervals = cluster_intervals(differences, [sample.group for sample in samples])
    compared = {
        id(cell): {
            "difference": float(difference.mean()),
            "difference_interval": [float(bound) for bound in interval],
            "only_stream": split.only_first,
            "only_prompt": split.only_second,
            "p_value": split.p_value,
            "p_adjusted": p_adjusted,
            "same_replies": sum(map(str.__eq__, cell.texts, prompts[cell.budget].texts)),
        }
        for cell, split, difference, interval, p_adjusted in zip(
            streams, splits, differences, intervals, adjusted, strict=True
        )
    }
    return [
        {
            "way": cell.way,
            "budget": cell.budget,
            "newest_whole": cell.newest_whole if cell.way != "prompt" else None,
            "accuracy": float(np.mean(cell.hits)),
            "interval": wilson_interval(sum(cell.hits), len(cell.hits)),
            "rows_share": float(np.mean(cell.kept)),
            "parked_share": float(np.mean(cell.parked)),
            "tasks": {
                task: [sum(right), len(right)]
                for task in TRAJECTORY_TASKS
                for right in [
                    [h for h, sample in zip(cell.hits, samples, strict=True) if sample.task == task]
                ]
            },
            **compared.get(id(cell), {}),
            "hits": "".join(str(int(right)) for right in cell.hits),
        }
        for cell in cells
    ]


def table_of(figures: Sequence[dict[str, object]]) -> list[tuple[str, ...]]:
    """A row for each way and budget."""
    header = (
        *("way", "newest", "budget", "rows kept", "parked", "right", "95 %"),
        *("against prompt mode", "95 %", "p", "p, Holm"),
    )
    rows: list[tuple[str, ...]] = [header]
    for figure in figures:
        low, high = cast(tuple[float, float], figure["interval"])
        row = [
            str(figure["way"]),
            {True: "whole", False: "compacted", None: ""}[cast(bool | None, figure["newest_whole"])],
            f"{figure['budget']:.0%}",
            f"{figure['rows_share']:.1%}",
            f"{figure['parked_share']:.1%}",
            f"{figure['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
        ]
        if "difference" in figure:
            low, high = cast(list[float], figure["difference_interval"])
            row += [f"{figure['difference']:+.1%}", f"{low:+.1%} to {high:+.1%}"]
            row += [f"{figure['p_value']:.2g}", f"{figure['p_adjusted']:.2g}"]
        rows.append((*row, *[""] * (len(header) - len(row))))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000, help="most questions")
    parser.add_argument("--minutes", type=float, default=60.0, help="no episode begins after so long")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--preset", default="fp32", help="quantization of gui-tiny's engine")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help="JSON file with all figures")
    args = parser.parse_args()
    drawn = trajectory_samples(args.split, args.seed, args.count)
    with engines(args.preset) as directories:
        cells, samples = run(directories[args.preset], drawn, args.budgets, args.jobs, args.minutes)
    figures = figures_of(cells, samples)
    details = {
        "benchmark": "stream_accuracy",
        "engine": f"gui-tiny {args.preset}",
        "split": args.split,
        "seed": args.seed,
        "questions": len(samples),
        "episodes": len({sample.group for sample in samples}),
        "ids": [sample.id for sample in samples],
        "cells": figures,
    }
    report(table_of(figures), details, args.out)


if __name__ == "__main__":
    main()
