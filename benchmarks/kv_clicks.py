# SPDX-License-Identifier: Apache-2.0
"""Click accuracy of every KV method that the engine runs, by budget, on held-out single screens.

    python benchmarks/kv_clicks.py --screens 130 --budgets 0.15 0.2 0.3 0.4 0.6 0.8

One prefill per question; each method and budget compacts that same arena into a pool of its own. Rows marked
``native - …`` switch one change of native mode off, so that the table says what each is worth.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import engines, report
from PIL import Image
from rich.console import Console
from rich.progress import track
from splits import held_out

from starkv.evaluation.statistics import wilson_interval
from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.actions.parser import ActionParseError, parse_response
from starkv.runtime.actions.types import Click
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Rope
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.kv.prompt import describe_prompt
from starkv.runtime.preprocess.image import preprocess
from starkv.runtime.preprocess.positions import multimodal_positions, rope_tables, text_positions
from starkv.runtime.preprocess.tokenizer import expand_image_tokens

SIZE, QUESTIONS, LONGEST_REPLY = 224, 12, 16
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

    def __init__(self, agent: Agent, image: Image.Image, text: str) -> None:
        engine, self._agent = agent.engine, agent
        manifest = engine.manifest
        seen = preprocess(image, manifest.vision, manifest.image)
        grid = seen.merged_grid
        content = [{"type": "image"}, {"type": "text", "text": text}]
        ids = agent.tokenizer.encode(agent.tokenizer.render([{"role": "user", "content": content}]))
        ids = expand_image_tokens(ids, manifest.tokens.image_pad, [grid[0] * grid[1]])
        embeds = engine.embed(ids)
        embeds[np.asarray(ids) == manifest.tokens.image_pad] = engine.encode_image(seen)
        positions = multimodal_positions(ids, manifest.tokens.image_pad, [grid])
        self._next = positions.next_position
        self.prompt = describe_prompt(ids, [grid], manifest, agent.tokenizer)
        self.arena = engine.new_arena(len(ids))
        rope = Rope(*rope_tables(positions.values, manifest.text))
        self._logits = engine.prefill(self.arena, embeds, rope)

    def answer(self, policy: KvPolicy) -> tuple[str, int]:
        """Greedy reply, and the bytes that the prompt's rows held."""
        engine, rows = self._agent.engine, self.prompt.length
        pool = engine.new_pool(1, engine.most_kept_rows(rows, policy) + LONGEST_REPLY)
        engine.compress(self.arena, pool, pool.acquire(), self.prompt, policy)
        held = pool.kv.bytes_held
        return self.decode(pool), held

    def decode(self, pool: Pool) -> str:
        """Greedy reply from the rows that the pool's sequence holds."""
        engine, tokens, logits = self._agent.engine, [], self._logits
        for step in range(LONGEST_REPLY):
            token = int(logits.argmax())
            if token in engine.manifest.tokens.end_of_text:
                break
            tokens.append(token)
            place = text_positions(1, self._next + step).values
            rope = Rope(*rope_tables(place, engine.manifest.text))
            logits = engine.decode(pool, engine.embed([token]), rope)[0]
        return self._agent.tokenizer.decode(tokens)


def clicked(text: str) -> tuple[float, float] | None:
    """The point that a reply clicks on, if it clicks."""
    try:
        actions = parse_response(text).actions
    except ActionParseError:
        return None
    first = actions[0] if actions else None
    return (first.point.x, first.point.y) if isinstance(first, Click) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screens", type=int, default=130)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.15, 0.2, 0.3, 0.4, 0.6, 0.8])
    parser.add_argument("--preset", default="fp32", help="quantization of the engine")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    args = parser.parse_args()

    hits: dict[tuple[str, float], list[bool]] = defaultdict(list)
    held: dict[tuple[str, float], list[int]] = defaultdict(list)
    with engines(args.preset) as directories:
        agent = Agent.load(directories[args.preset])
        for index in track(range(args.screens), "screens", console=Console(stderr=True)):
            screen, drawn = held_out(args.split, index, SIZE, QUESTIONS)
            image = Image.fromarray(screen.image)
            for asked in drawn[: len(screen.elements)]:
                question = Question(agent, image, asked.text)
                cells = [(FULL, 1.0, KvPolicy())]
                cells += [(name, budget, p) for budget in args.budgets for name, p in policies(budget)]
                for name, budget, policy in cells:
                    text, size = question.answer(policy)
                    point = clicked(text)
                    hits[name, budget].append(point is not None and asked.element.contains(*point))
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
        {"benchmark": "kv_clicks", "split": args.split, "screens": args.screens, "figures": figures},
        args.out,
    )
    print(f"\nfull cache: {right / total:.1%} of {total} questions")


if __name__ == "__main__":
    main()
