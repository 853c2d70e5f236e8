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
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
from common import engines, report
from stream_asking import STREAMS, Reply, StreamAsker, Way

from starkv.evaluation.answers import answer_of
from starkv.evaluation.boxes import Box
from starkv.evaluation.graders.point import click_in_box
from starkv.evaluation.paired import Discordance, cluster_intervals, holm
from starkv.evaluation.shared_prefill import SharedPrefill
from starkv.evaluation.statistics import wilson_interval
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.runtime.agent import Agent, interpret
from starkv.runtime.engines.base import Engine
from starkv.runtime.kv.policy import KvPolicy, StarKVMemory
from starkv.runtime.timings import Timings
from starkv.synthetic.samples import Sample
from starkv.synthetic.suite import SPLITS, TRAJECTORY_TASKS, trajectory_samples

WHOLE = 1.0
"""Budget that stands for the full cache."""


@dataclass
class Cell:
    """One way at one budget, over all questions."""

    way: Way
    budget: float
    hits: list[bool] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    """Share of the prompt's rows behind which the reply was decoded."""
    texts: list[str] = field(default_factory=list)
    memory: StarKVMemory | None = None
    """Of the episode so far, in prompt mode."""

    @property
    def policy(self) -> KvPolicy:
        return KvPolicy(FULL) if self.budget == WHOLE else KvPolicy(STAR_KV, Budget(self.budget))

    def ask(self, asker: StreamAsker, sample: Sample) -> Reply:
        """Ask; in prompt mode with what is remembered of the episode."""
        reply = asker.ask(sample, self.way, self.policy, self.memory)
        if self.way == "prompt":
            self.memory = reply.memory
        return reply


def cells_of(budgets: Sequence[float]) -> list[Cell]:
    """All cells: without eviction the kinds of streams are one."""
    ways: tuple[Way, ...] = ("prompt", *STREAMS)
    whole: list[Way] = ["prompt", "stream"]
    return [Cell(way, WHOLE) for way in whole] + [Cell(way, b) for way in ways for b in budgets]


def hit(agent: Agent, asker: StreamAsker, sample: Sample, text: str) -> bool:
    """Whether a reply's click is right."""
    manifest = agent.engine.manifest
    reply = interpret(text, manifest, asker.seen(sample), Timings(), "stop")
    return bool(click_in_box(answer_of(reply, manifest.coordinates), Box(*map(float, sample.box))))


def run(agent: Agent, cells: Sequence[Cell], samples: Sequence[Sample], tokens: int, seconds: float) -> int:
    """Ask questions, whole episodes of them, until there are no more or the time is up; returns how many."""
    shared = SharedPrefill(agent.engine)
    asker = StreamAsker(agent, cast(Engine, shared), tokens)
    started, group = time.monotonic(), ""
    for number, sample in enumerate(samples):
        if sample.group != group:
            if time.monotonic() - started > seconds:
                return number
            group = sample.group
            for cell in cells:
                cell.memory = None
        shared.forget_images()
        for cell in cells:
            reply = cell.ask(asker, sample)
            cell.hits.append(hit(agent, asker, sample, reply.text))
            cell.kept.append(reply.kept / reply.full)
            cell.texts.append(reply.text)
        print(f"question {number + 1}", file=sys.stderr, end="\r", flush=True)
    return len(samples)


def figures_of(cells: Sequence[Cell], samples: Sequence[Sample]) -> list[dict[str, object]]:
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
            "accuracy": float(np.mean(cell.hits)),
            "interval": wilson_interval(sum(cell.hits), len(cell.hits)),
            "rows_share": float(np.mean(cell.kept)),
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
    header = ("way", "budget", "rows kept", "right", "95 %", "against prompt mode", "95 %", "p", "p, Holm")
    rows: list[tuple[str, ...]] = [header]
    for figure in figures:
        low, high = cast(tuple[float, float], figure["interval"])
        row = [
            str(figure["way"]),
            f"{figure['budget']:.0%}",
            f"{figure['rows_share']:.1%}",
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
    parser.add_argument("--threads", type=int, help="default: all processors that may be used")
    parser.add_argument("--out", type=Path, help="JSON file with all figures")
    args = parser.parse_args()
    samples = list(islice(trajectory_samples(args.split, args.seed, args.count), args.count))
    cells = cells_of(args.budgets)
    with engines(args.preset) as directories:
        agent = Agent.load(directories[args.preset], threads=args.threads)
        asked = run(agent, cells, samples, 48, 60 * args.minutes)
    samples = samples[:asked]
    figures = figures_of(cells, samples)
    details = {
        "benchmark": "stream_accuracy",
        "engine": f"gui-tiny {args.preset}",
        "threads": agent.engine.info.threads,
        "split": args.split,
        "seed": args.seed,
        "questions": asked,
        "episodes": len({sample.group for sample in samples}),
        "ids": [sample.id for sample in samples],
        "cells": figures,
    }
    report(table_of(figures), details, args.out)


if __name__ == "__main__":
    main()
