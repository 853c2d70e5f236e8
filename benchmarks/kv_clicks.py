# SPDX-License-Identifier: Apache-2.0
"""Click accuracy of every KV method that the engine runs, by budget, on the suite's single screens.

    python benchmarks/kv_clicks.py --count 1000 --budgets 0.15 0.2 0.3 0.4 0.6 0.8

One prefill per question; each method and budget compacts that same arena into a pool of its own. Rows marked
``native - …`` switch one change of native mode off, so that the table says what each is worth.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common import engines, named_clicks, report
from greedy import greedy_replies
from prefilled import FrameCache, clicked, prefill
from rich.console import Console
from rich.progress import track

from starkv.evaluation.statistics import wilson_interval
from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.agent import Agent
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.policy import KvPolicy
from starkv.synthetic.samples import Sample

LONGEST_REPLY = 16
NATIVE = StarKVConfig()
VARIANTS = {
    "native": NATIVE,
    "official": StarKVConfig.official(),
    "native - protected rows": replace(NATIVE, protect_rows=False),
    "native - layer budgets": replace(NATIVE, entropy=False),
    "native - spatial prior": replace(NATIVE, mi=False),
    "native - hidden-norm boost": replace(NATIVE, boost=0.0),
}


def policies(budget: float) -> Iterator[tuple[str, KvPolicy]]:
    """Every method at one budget, with its row's name."""
    for name, config in VARIANTS.items():
        yield f"star_kv {name}", KvPolicy(STAR_KV, Budget(budget), config)
    for method in ENGINE_METHODS:
        if method not in (FULL, STAR_KV):
            yield method, KvPolicy(method, Budget(budget))


class Question:
    """One prefilled question, which any policy may answer."""

    def __init__(self, agent: Agent, sample: Sample) -> None:
        self._agent = agent
        self._prefilled = prefill(agent, sample, FrameCache(agent))
        self.prompt, self.arena = self._prefilled.prompt, self._prefilled.arena

    def answer(self, policy: KvPolicy) -> tuple[bool, int]:
        """Whether the greedy reply clicks right, and the bytes that the prompt's rows held."""
        engine, rows = self._agent.engine, self.prompt.length
        pool = engine.new_pool(1, engine.most_kept_rows(rows, policy) + LONGEST_REPLY)
        engine.compress(self.arena, pool, pool.acquire(), self.prompt, policy)
        held = pool.kv.bytes_held
        return self.clicks_right(pool), held

    def clicks_right(self, pool: Pool) -> bool:
        """Whether the greedy reply from the rows of the pool's one sequence clicks right."""
        asked, manifest = self._prefilled, self._agent.engine.manifest
        (reply,) = greedy_replies(
            self._agent, pool, asked.logits, asked.next_position, LONGEST_REPLY
        ).values()
        point = clicked(reply, asked, manifest.prompt, manifest.coordinates)
        return point is not None and asked.sample.hit(*point)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="questions")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.15, 0.2, 0.3, 0.4, 0.6, 0.8])
    parser.add_argument("--preset", default="fp32", help="quantization of the engine")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()

    hits: dict[tuple[str, float], list[bool]] = defaultdict(list)
    held: dict[tuple[str, float], list[int]] = defaultdict(list)
    with engines(args.preset) as directories:
        agent = Agent.load(directories[args.preset])
        asked = named_clicks(args.split, args.count)
        for sample in track(asked, "questions", console=Console(stderr=True)):
            question = Question(agent, sample)
            cells = [(FULL, 1.0, KvPolicy())]
            cells += [(name, budget, p) for budget in args.budgets for name, p in policies(budget)]
            for name, budget, policy in cells:
                right, size = question.answer(policy)
                hits[name, budget].append(right)
                held[name, budget].append(size)

    full_bytes = sum(held[FULL, 1.0])
    names = list(dict.fromkeys(name for name, _ in hits if name != FULL))
    header = ("method", *(f"{budget:.0%}" for budget in args.budgets), "bytes held at each")
    table: list[tuple[str, ...]] = [header]
    figures = {}
    for name in names:
        rates, sizes = [], []
        for budget in args.budgets:
            right, total = sum(hits[name, budget]), len(hits[name, budget])
            share = sum(held[name, budget]) / full_bytes
            rates.append(f"{right / total:.1%}")
            sizes.append(f"{share:.1%}")
            figures[f"{name} @ {budget:g}"] = {
                "right": right,
                "questions": total,
                "interval": wilson_interval(right, total),
                "bytes_share": share,
            }
        table.append((name, *rates, " ".join(sizes)))
    right, total = sum(hits[FULL, 1.0]), len(hits[FULL, 1.0])
    figures["full"] = {"right": right, "questions": total, "interval": wilson_interval(right, total)}
    report(
        table,
        {"benchmark": "kv_clicks", "split": args.split, "questions": args.count, "figures": figures},
        args.out,
    )
    print(f"\nfull cache: {right / total:.1%} of {total} questions")


if __name__ == "__main__":
    main()
