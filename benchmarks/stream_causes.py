# SPDX-License-Identifier: Apache-2.0
"""Where a stream's wrong answers come from: trajectory questions answered from transplanted rows.

    python benchmarks/stream_causes.py --count 120 --out stream-causes.json

A stream that compacts every screenshot at once differs from prompt mode in two things: which rows are left
for the reply, and what numbers are in them, because each screenshot was read behind a thinned history. Here
they are changed one at a time: a reply is decoded from the rows that one way chose with the numbers that the
other computed, and the last screenshot is read behind other histories. The question always comes with the
last screenshot; where that is read behind another history, or in parts, the reply sees all of its rows. In
prompt mode STaR-KV remembers no earlier question.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from zlib import crc32

import numpy as np
from common import engines, report
from numpy.typing import NDArray
from stream_transplants import Question, Transplanter, before, same_tokens, since

from starkv.evaluation.answers import answer_of
from starkv.evaluation.boxes import Box
from starkv.evaluation.graders.point import click_in_box
from starkv.evaluation.paired import Discordance, holm
from starkv.evaluation.statistics import wilson_interval
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.agent import Agent, interpret
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.timings import Timings
from starkv.synthetic.samples import Sample
from starkv.synthetic.suite import SPLITS, TRAJECTORY_TASKS, trajectory_samples

LONGEST_REPLY = 48
"""Tokens."""
BASELINE = "stream"


def of_all_layers(asked: Question, tokens: NDArray[np.int64]) -> ParkedRows:
    """Exact rows of these tokens in every layer."""
    return asked.exact.take([tokens] * len(asked.exact.row_meta))


def as_many_at_random(asked: Question) -> ParkedRows:
    """All text and random tokens of earlier screenshots: as many rows as the stream's history has."""
    random, text = np.random.default_rng(crc32(asked.sample.id.encode())), asked.history()
    others = np.setdiff1d(np.arange(asked.first), text)
    rows = []
    for length in asked.state.rows.lengths:
        drawn = random.choice(others, max(0, int(length) - len(text)), replace=False)
        rows.append(np.sort(np.concatenate([text, drawn])))
    return asked.exact.take(rows)


Variant = Callable[[Transplanter, Question], str]

VARIANTS: dict[str, Variant] = {
    "prompt mode": lambda t, q: t.reply(q, q.chosen, exact=True),
    BASELINE: lambda t, q: t.reply(q, q.kept, exact=False),
    "stream, the last piece whole": lambda t, q: t.reply(q, q.read, exact=False),
    "rows as the stream chose, numbers exact": lambda t, q: t.reply(
        q, same_tokens(q.exact, q.kept), exact=True
    ),
    "rows as prompt mode chose, of the last piece with the stream's numbers": lambda t, q: t.reply(
        q, before(q.chosen, q.first).merged(same_tokens(since(q.read, q.first), q.chosen)), exact=False
    ),
    "last screenshot exact, words read behind the stream's history": lambda t, q: t.reply_to(
        q, q.state.rows, since(q.exact, q.first)
    ),
    "last screenshot the stream's, words read behind everything": lambda t, q: t.reply_to(
        q, before(q.exact, q.first), since(q.read, q.first)
    ),
    "behind the stream's tokens, exact": lambda t, q: t.reply_behind(
        q, same_tokens(before(q.exact, q.first), q.state.rows)
    ),
    "behind all text and as many rows, at random": lambda t, q: t.reply_behind(q, as_many_at_random(q)),
    "behind all text": lambda t, q: t.reply_behind(q, of_all_layers(q, q.history())),
    "behind all text and the first screenshot": lambda t, q: t.reply_behind(
        q, of_all_layers(q, q.history(0))
    ),
    "behind all text and the screenshot before": lambda t, q: t.reply_behind(
        q, of_all_layers(q, q.history(len(q.sample.frames) - 2))
    ),
}


def answers(agent: Agent, samples: Sequence[Sample], budget: float, minutes: float) -> dict[str, list[bool]]:
    """Whether each variant's click hits; no episode begins after so many minutes."""
    transplanter, policy = Transplanter(agent, LONGEST_REPLY), KvPolicy(STAR_KV, Budget(budget))
    manifest, end = agent.engine.manifest, time.monotonic() + 60 * minutes
    hits: dict[str, list[bool]] = {name: [] for name in VARIANTS}
    for _, episode in groupby(samples, key=lambda sample: sample.group):
        if time.monotonic() > end:
            break
        for sample in episode:
            question = transplanter.question(sample, policy)
            box = Box(*map(float, sample.box))
            for name, variant in VARIANTS.items():
                said = variant(transplanter, question)
                read = interpret(said, manifest, transplanter.seen(sample), Timings(), "stop")
                hits[name].append(bool(click_in_box(answer_of(read, manifest.coordinates), box)))
            print(f"{len(hits[BASELINE])} questions", file=sys.stderr, end="\r", flush=True)
    return hits


def figures_of(hits: dict[str, list[bool]], tasks: Sequence[str]) -> list[dict[str, object]]:
    """Accuracy of each variant, by task, and McNemar's test against the stream."""
    splits = {name: Discordance.of(some, hits[BASELINE]) for name, some in hits.items() if name != BASELINE}
    adjusted = dict(zip(splits, holm([split.p_value for split in splits.values()]), strict=True))
    return [
        {
            "variant": name,
            "accuracy": float(np.mean(some)),
            "interval": wilson_interval(sum(some), len(some)),
            "p_adjusted": adjusted.get(name),
            "tasks": {
                task: [
                    sum(hit for hit, other in zip(some, tasks, strict=True) if other == task),
                    tasks.count(task),
                ]
                for task in TRAJECTORY_TASKS
            },
            "hits": "".join(str(int(hit)) for hit in some),
        }
        for name, some in hits.items()
    ]


def table_of(figures: Sequence[dict[str, object]]) -> list[tuple[str, ...]]:
    """A row for each variant."""
    rows: list[tuple[str, ...]] = [("reply decoded from, or read", "right", "p, Holm", *TRAJECTORY_TASKS)]
    for figure in figures:
        tasks, p_value = figure["tasks"], figure["p_adjusted"]
        assert isinstance(tasks, dict)
        shown = [f"{right} of {of}" for right, of in tasks.values()]
        p_shown = "" if p_value is None else f"{p_value:.2g}"
        rows.append((str(figure["variant"]), f"{figure['accuracy']:.1%}", p_shown, *shown))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=120, help="most questions")
    parser.add_argument("--minutes", type=float, default=60.0, help="no episode begins after so long")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--out", type=Path, help="JSON file with all figures")
    args = parser.parse_args()
    samples = list(trajectory_samples(args.split, args.seed, args.count))
    with engines("fp32") as directories:
        agent = Agent.load(directories["fp32"], threads=1)
        hits = answers(agent, samples, args.budget, args.minutes)
    asked = samples[: len(hits[BASELINE])]
    figures = figures_of(hits, [sample.task for sample in asked])
    details = {
        "benchmark": "stream_causes",
        "engine": "gui-tiny fp32",
        "split": args.split,
        "seed": args.seed,
        "budget": args.budget,
        "questions": len(asked),
        "ids": [sample.id for sample in asked],
        "variants": figures,
    }
    report(table_of(figures), details, args.out)


if __name__ == "__main__":
    main()
