# SPDX-License-Identifier: Apache-2.0
"""Which layers should keep more rows? Ways to divide the same total, by clicks and on random keys.

    python benchmarks/layer_budgets.py --count 200 --out results.json

Clicks: gui-tiny on screens of the validation split, native STaR-KV's scores and protected rows, everything
equal but the rows of each layer. Random keys: the error of the attention output of the last query, relative
to its length, mean over six layers from very sharp to nearly flat attention; there spread-out layers hold
nothing but noise.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import engines, named_clicks, report
from greedy import greedy_replies
from numpy.typing import NDArray
from prefilled import FrameCache, Prefilled, clicked, prefill
from rich.console import Console
from rich.progress import track

from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_stages import layer_rows
from starkv.runtime.agent import Agent
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.policy import KvPolicy

Array = NDArray[np.float64]
WINDOW, BUDGETS = 8, (0.08, 0.1, 0.15, 0.2, 0.4)
LONGEST_REPLY = 20
SHARPNESS = (6.0, 3.0, 2.0, 1.0, 0.5, 0.1)


def proportional(needed: Array, mean: int, past: int, least: float, most: float) -> NDArray[np.int64]:
    """Rows in proportion to ``needed [L]``, between ``least`` and ``most`` times the mean."""
    floor = min(mean, max(1, int(np.ceil(least * mean))))
    ceiling = max(mean, min(past, int(most * mean)))
    shares = layer_rows(torch.from_numpy(needed)[:, None], mean, floor, ceiling)
    rows: NDArray[np.int64] = shares[:, 0].numpy()
    return rows


def effective(share: Array) -> Array:
    """Exponential of each layer's entropy: ``[L, S]`` → ``[L]``."""
    return np.exp(-(share * np.log(share + 1e-12)).sum(-1))


def most_mass(share: Array, mean: int, past: int, least: float, most: float) -> NDArray[np.int64]:
    """Rows that hold the most attention mass in total: the best rows of all layers together."""
    floor = min(mean, max(1, int(np.ceil(least * mean))))
    ceiling = max(mean, min(past, int(most * mean)))
    best = -np.sort(-share, -1)[:, floor:ceiling]
    order = np.argsort(-best, axis=None, kind="stable")[: mean * len(share) - floor * len(share)]
    return floor + np.bincount(order // best.shape[1], minlength=len(share))


Divide = Callable[[Array, int, int], NDArray[np.int64]]
"""Shares ``[L, S]`` of the scores, mean rows and competing rows → rows of each layer."""

WAYS: dict[str, Divide] = {
    "the same rows in every layer": lambda share, mean, past: np.full(len(share), mean),
    "effective rows, 0.75 … 1.25": lambda share, mean, past: proportional(
        effective(share), mean, past, 0.75, 1.25
    ),
    "effective rows, 0.5 … 1.5": lambda share, mean, past: proportional(
        effective(share), mean, past, 0.5, 1.5
    ),
    "the most attention mass, 0.75 … 1.25": lambda share, mean, past: most_mass(
        share, mean, past, 0.75, 1.25
    ),
    "the reverse of effective rows": lambda share, mean, past: proportional(
        1.0 / effective(share), mean, past, 0.75, 1.25
    ),
    "early layers more (1.5 … 0.5)": lambda share, mean, past: proportional(
        np.linspace(1.5, 0.5, len(share)), mean, past, 0.4, 1.6
    ),
}


def scores_of(agent: Agent, asked: Prefilled) -> Array:
    """Native STaR-KV's scores ``[L, S]`` of the rows before the window."""
    engine, length = agent.engine, asked.prompt.length
    policy = KvPolicy(STAR_KV, Budget(0.5), StarKVConfig(entropy=False))
    scratch = engine.new_pool(1, length)
    result = engine.compress(asked.arena, scratch, scratch.acquire(), asked.prompt, policy)
    assert result.scores is not None
    return result.scores[:, 0, : length - WINDOW].astype(np.float64)


def keep(pool: Pool, asked: Prefilled, best: NDArray[np.int64], counts: NDArray[np.int64]) -> int:
    """Copy each layer's best rows and the window into a slot of a pool; returns its handle."""
    handle, slot, kv, length = pool.acquire(), pool.active - 1, asked.arena.kv, asked.prompt.length
    for layer, count in enumerate(counts):
        rows = np.r_[np.sort(best[layer, :count]), length - WINDOW : length]
        pool.kv.keys[layer, slot, :, : len(rows)] = kv.keys[layer, 0][:, rows]
        pool.kv.values[layer, slot, :, : len(rows)] = kv.values[layer, 0][:, rows]
        pool.kv.lengths[layer, slot] = len(rows)
    return handle


def clicks(agent: Agent, count: int) -> dict[str, list[float]]:
    """Share of clicks that hit, by way and budget, and the number of questions under ``questions``."""
    hits: dict[tuple[str, float], list[bool]] = defaultdict(list)
    engine, frames = agent.engine, FrameCache(agent)
    for sample in track(named_clicks("validation", count), "questions", console=Console(stderr=True)):
        asked = prefill(agent, sample, frames)
        length, scores = asked.prompt.length, scores_of(agent, asked)
        share = scores / scores.sum(-1, keepdims=True)
        pool = engine.new_pool(len(WAYS) * len(BUDGETS), length + LONGEST_REPLY)
        cells = {}
        for budget in BUDGETS:
            kept = Budget(budget).rows(length)
            ranked = scores.copy()
            ranked[:, list(asked.prompt.protected(kept, WINDOW))] = np.inf
            best = np.argsort(-ranked, -1, kind="stable")
            for name, divide in WAYS.items():
                counts = divide(share, kept - WINDOW, length - WINDOW)
                assert counts.sum() == (kept - WINDOW) * len(share)
                cells[keep(pool, asked, best, counts)] = name, budget
        replies = greedy_replies(agent, pool, asked.logits, asked.next_position, LONGEST_REPLY)
        for handle, reply in replies.items():
            point = clicked(reply, asked, engine.manifest.prompt, engine.manifest.coordinates)
            hits[cells[handle]].append(point is not None and sample.hit(*point))
    shares = {name: [float(np.mean(hits[name, budget])) for budget in BUDGETS] for name in WAYS}
    return {**shares, "questions": [float(len(hits[next(iter(WAYS)), BUDGETS[0]]))]}


def random_keys(rows: int = 400, dim: int = 16, draws: int = 20) -> dict[str, list[float]]:
    """Relative error of the attention output on random keys, by way and budget."""
    random = np.random.default_rng(0)
    errors: dict[tuple[str, float], list[float]] = defaultdict(list)
    for _ in range(draws):
        keys, values = random.standard_normal((2, len(SHARPNESS), rows, dim))
        query = random.standard_normal((len(SHARPNESS), dim)) * np.array(SHARPNESS)[:, None]
        logits = np.einsum("lrd,ld->lr", keys, query) / np.sqrt(dim)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        full = np.einsum("lr,lrd->ld", share, values + 1.0)
        order = np.argsort(-share, -1)
        for budget in BUDGETS:
            for name, divide in WAYS.items():
                counts = divide(share, int(budget * rows), rows)
                for layer, count in enumerate(counts):
                    kept = order[layer, :count]
                    part = share[layer, kept] / share[layer, kept].sum() @ (values[layer, kept] + 1.0)
                    error = np.linalg.norm(part - full[layer]) / np.linalg.norm(full[layer])
                    errors[name, budget].append(float(error))
    return {name: [float(np.mean(errors[name, budget])) for budget in BUDGETS] for name in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    errors = random_keys()
    with engines("fp32") as directories:
        hit = clicks(Agent.load(directories["fp32"]), args.count)
    header = ("way", *(f"clicks {budget:.0%}" for budget in BUDGETS), *(f"error {b:.0%}" for b in BUDGETS))
    table = [header]
    for name in WAYS:
        table.append((name, *(f"{x:.1%}" for x in hit[name]), *(f"{x:.3f}" for x in errors[name])))
    figures = {"benchmark": "layer_budgets", "budgets": BUDGETS, "clicks": hit, "random_keys": errors}
    report(table, figures, args.out)


if __name__ == "__main__":
    main()
