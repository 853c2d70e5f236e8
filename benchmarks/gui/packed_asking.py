# SPDX-License-Identifier: Apache-2.0
"""Asks a question with every packing at every budget, and grades the replies.

A question is prefilled and evicted once, by the plain engine. The packed engines have the same weights, so
the rows that it kept are packed into their caches as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from cells import budget_key
from greedy import forced_logits, greedy_tokens
from packings import EVICTED, PackedCell, PackedRecord
from prefilled import FrameCache, Prefilled, clicked, prefill

from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.runtime.agent import Agent
from starkv.runtime.engines.base import Engine, Floats
from starkv.runtime.kv.buffers import KvBuffers, Pool
from starkv.runtime.kv.packed import PackedKv
from starkv.runtime.kv.policy import KvPolicy, StarKVMemory
from starkv.synthetic.samples import Sample
from starkv.validation.quant import kl_divergence

WHOLE = 1.0
"""Budget without eviction."""


@dataclass(frozen=True)
class _Reference:
    """What the whole float cache says."""

    tokens: list[int]
    text: str
    logits: Floats
    """``[tokens, vocab]`` behind each token."""


class PackedAsker:
    """Asks one question after the other.

    Args:
        agent: the plain engine and its tokenizer.
        packed: packed engines of the same weights, by the rows' names.
        budgets: shares of the prompt's rows to keep; 1 evicts nothing.
        max_new_tokens: longest reply.
    """

    def __init__(
        self, agent: Agent, packed: Mapping[str, Engine], budgets: Sequence[float], max_new_tokens: int
    ) -> None:
        self._agent, self._packed, self._most = agent, packed, max_new_tokens
        self._budgets = sorted({WHOLE, *budgets}, reverse=True)
        self.frames = FrameCache(agent)
        self._memories: dict[float, StarKVMemory | None] = {}
        self._pools: dict[str, Pool] = {}

    def forget(self) -> None:
        """Begin a new trajectory: STaR-KV remembers nothing of the questions before."""
        self._memories.clear()

    def ask(self, sample: Sample) -> PackedRecord:
        """Ask a question, which goes on with the trajectory of those since :meth:`forget`.

        Raises:
            StarkvError: the prompt is too long for the engine, or its keys are not numbers.
        """
        asked = prefill(self._agent, sample, self.frames)
        kept = {budget: self._kept(asked, budget) for budget in self._budgets}
        reference = self._reference(asked, kept[WHOLE])
        engine = self._agent.engine
        plain = self._cells(asked, EVICTED, engine, kept, reference)
        cells = {FULL: {budget_key(WHOLE): plain.pop(budget_key(WHOLE))}, EVICTED: plain}
        for name, packed in self._packed.items():
            cells[name] = self._cells(asked, name, packed, kept, reference)
        height, width = sample.frames[-1].shape[:2]
        return PackedRecord(
            id=sample.id,
            task=sample.task,
            group=sample.group,
            frames=len(sample.frames),
            size=(width, height),
            prompt_rows=asked.prompt.length,
            full_bytes=asked.arena.kv.bytes_held,
            cells={name: by_budget for name, by_budget in cells.items() if by_budget},
        )

    def _kept(self, asked: Prefilled, budget: float) -> KvBuffers:
        """The rows that a budget keeps, as floats, in slot 0."""
        engine = self._agent.engine
        policy = KvPolicy() if budget == WHOLE else KvPolicy(STAR_KV, Budget(budget))
        pool = engine.new_pool(1, engine.most_rows_of(asked.prompt, policy), policy.method)
        memory = self._memories.get(budget)
        done = engine.compress(asked.arena, pool, pool.acquire(), asked.prompt, policy, memory)
        self._memories[budget] = done.memory
        return pool.host_kv

    def _reference(self, asked: Prefilled, whole: KvBuffers) -> _Reference:
        engine = self._agent.engine
        pool = self._filled(asked, EVICTED, engine, [whole])
        (tokens,) = greedy_tokens(engine, pool, asked.logits, asked.next_position, self._most).values()
        pool = self._filled(asked, EVICTED, engine, [whole])
        logits = forced_logits(engine, pool, tokens, asked.next_position)[:, 0]
        return _Reference(tokens, self._agent.tokenizer.decode(tokens), logits)

    def _filled(self, asked: Prefilled, name: str, engine: Engine, kept: Sequence[KvBuffers]) -> Pool:
        """The row's pool with these rows in its first slots; memory is made anew only where prompts grow."""
        most = asked.prompt.length + self._most
        pool = self._pools.get(name)
        if pool is None or pool.kv.capacity < most:
            pool = self._pools[name] = engine.new_pool(len(self._budgets), most, packed=name != EVICTED)
        for rows in kept:
            slot = pool.slot_of(pool.acquire())
            if isinstance(pool.kv, PackedKv):
                pool.kv.pack(slot, rows)
            else:
                pool.kv.load(slot, rows.park(0))
        return pool

    def _cells(
        self,
        asked: Prefilled,
        name: str,
        engine: Engine,
        kept: Mapping[float, KvBuffers],
        reference: _Reference,
    ) -> dict[str, PackedCell]:
        pool = self._filled(asked, name, engine, list(kept.values()))
        held = [pool.kv.bytes_of(slice(slot, slot + 1)) for slot in range(pool.active)]
        logits = forced_logits(engine, pool, reference.tokens, asked.next_position)
        replies = self._replies(asked, name, engine, list(kept.values()), logits, reference)
        manifest = self._agent.engine.manifest
        cells = {}
        for number, (budget, rows) in enumerate(kept.items()):
            text = replies[number]
            point = clicked(text, asked, manifest.prompt, manifest.coordinates)
            divergences = kl_divergence(reference.logits, logits[:, number])
            cells[budget_key(budget)] = PackedCell(
                text=text,
                point=point,
                hit=point is not None and asked.sample.hit(*point),
                distance=None if point is None else round(asked.sample.distance(*point), 3),
                rows=float(rows.lengths[:, 0].mean()),
                bytes=held[number],
                same=text == reference.text,
                divergences=tuple(float(f"{value:.3g}") for value in divergences),
            )
        return cells

    def _replies(
        self,
        asked: Prefilled,
        name: str,
        engine: Engine,
        kept: Sequence[KvBuffers],
        logits: Floats,
        reference: _Reference,
    ) -> list[str]:
        """Greedy replies; a sequence whose likeliest tokens were the given ones would only say them again."""
        end = engine.manifest.tokens.end_of_text
        following = cast(list[int], reference.logits.argmax(-1).tolist())
        # Of a reply that was cut off nobody knows how it would have gone on.
        count = len(following) if following and following[-1] in end else len(following) - 1
        chosen = logits.argmax(-1)[: max(0, count)]
        astray = np.flatnonzero((chosen != np.array(following[: max(0, count)])[:, None]).any(0))
        replies = [reference.text] * len(kept)
        if len(astray):
            pool = self._filled(asked, name, engine, [kept[number] for number in astray])
            handles = list(pool.handles)
            written = greedy_tokens(engine, pool, asked.logits, asked.next_position, self._most)
            for number, handle in zip(astray.tolist(), handles, strict=True):
                replies[number] = self._agent.tokenizer.decode(written[handle])
        return replies
