# SPDX-License-Identifier: Apache-2.0
"""Asks a question at every row and budget of the table, and grades the replies."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from cells import Cell, TableRecord, budget_key
from components import components_acted, request_of
from greedy import greedy_replies
from oracle import keep_rows, oracle_rows
from prefilled import FrameCache, Prefilled, clicked, prefill
from rows import ORACLE, Row, budgets_of

from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.methods.star_kv_plan import StarKVProgress
from starkv.runtime.agent import Agent
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.policy import StarKVMemory
from starkv.synthetic.samples import Sample


@dataclass(frozen=True)
class Job:
    """One row at one budget."""

    row: Row
    budget: float


@dataclass(frozen=True)
class _Kept:
    """What a job holds of the prompt."""

    rows: float
    bytes: int
    acted: tuple[str, ...]


class Asker:
    """Asks one question after the other.

    Args:
        agent: engine and tokenizer.
        rows: of the table.
        budgets: shares of the prompt's rows to keep.
        max_new_tokens: longest reply.
        batch: most sequences that are decoded together.
    """

    def __init__(
        self, agent: Agent, rows: Sequence[Row], budgets: list[float], max_new_tokens: int, batch: int = 16
    ) -> None:
        self._agent, self._most, self._batch = agent, max_new_tokens, batch
        self.frames = FrameCache(agent)
        jobs = [Job(row, budget) for row in rows for budget in budgets_of(row, budgets)]
        # Sequences of one budget are about equally long: a pool has slots of one size.
        self._jobs = sorted(jobs, key=lambda job: job.budget)
        self._memories: dict[tuple[str, float], StarKVMemory] = {}
        self._pools: dict[tuple[Job, ...], Pool] = {}

    def forget(self) -> None:
        """Begin a new trajectory: STaR-KV remembers nothing of the questions before."""
        self._memories.clear()

    def ask(self, sample: Sample) -> TableRecord:
        """Ask a question, which goes on with the trajectory of those since :meth:`forget`.

        Raises:
            StarkvError: the prompt is too long for the engine, a budget too small for a method, or the
                engine's keys are not numbers.
        """
        asked = prefill(self._agent, sample, self.frames)
        cells: dict[str, dict[str, Cell]] = {}
        for _, same in groupby(self._jobs, key=lambda job: job.budget):
            for jobs in self._batches(list(same)):
                for job, cell in zip(jobs, self._answer(asked, jobs), strict=True):
                    cells.setdefault(job.row.name, {})[budget_key(job.budget)] = cell
        height, width = sample.frames[-1].shape[:2]
        return TableRecord(
            id=sample.id,
            task=sample.task,
            group=sample.group,
            frames=len(sample.frames),
            size=(width, height),
            prompt_rows=asked.prompt.length,
            full_bytes=asked.arena.kv.bytes_held,
            cells=cells,
        )

    def _batches(self, jobs: list[Job]) -> list[list[Job]]:
        """Jobs that one pool holds. Methods that keep rows per attention head need slots of another shape."""
        per_head = [job for job in jobs if job.row.method.endswith("_per_head")]
        plain = [job for job in jobs if job not in per_head]
        return [
            some[start : start + self._batch]
            for some in (plain, per_head)
            for start in range(0, len(some), self._batch)
        ]

    def _answer(self, asked: Prefilled, jobs: list[Job]) -> list[Cell]:
        pool = self._pool(asked, tuple(jobs))
        handles = [pool.acquire() for _ in jobs]
        kept = [self._compress(asked, pool, handle, job) for handle, job in zip(handles, jobs, strict=True)]
        replies = greedy_replies(self._agent, pool, asked.logits, asked.next_position, self._most)
        manifest = self._agent.engine.manifest
        cells = []
        for handle, held in zip(handles, kept, strict=True):
            text = replies[handle]
            point = clicked(text, asked, manifest.prompt, manifest.coordinates)
            cells.append(
                Cell(
                    text=text,
                    point=point,
                    hit=point is not None and asked.sample.hit(*point),
                    distance=None if point is None else round(asked.sample.distance(*point), 3),
                    rows=held.rows,
                    bytes=held.bytes,
                    acted=held.acted,
                )
            )
        return cells

    def _pool(self, asked: Prefilled, jobs: tuple[Job, ...]) -> Pool:
        """An empty pool for these jobs; memory is made anew only where prompts grow."""
        engine, length = self._agent.engine, asked.prompt.length
        most = max(self._most_rows(job, length) for job in jobs) + self._most
        pool = self._pools.get(jobs)
        if pool is None or pool.kv.capacity < most:
            method = jobs[0].row.policy(jobs[0].budget).method
            pool = self._pools[jobs] = engine.new_pool(len(jobs), most, method)
        return pool

    def _most_rows(self, job: Job, length: int) -> int:
        if job.row.method == ORACLE:
            return Budget(job.budget).rows(length)
        return self._agent.engine.most_kept_rows(length, job.row.policy(job.budget))

    def _compress(self, asked: Prefilled, pool: Pool, handle: int, job: Job) -> _Kept:
        engine, policy = self._agent.engine, job.row.policy(job.budget)
        request = stages = None
        if job.row.method == ORACLE:
            keep_rows(
                asked.arena, pool, handle, oracle_rows(asked, Budget(job.budget).rows(asked.prompt.length))
            )
        else:
            key = (job.row.name, job.budget)
            memory = self._memories.get(key)
            progress = memory.progress if memory else StarKVProgress()
            window = engine.manifest.observation_window
            request = request_of(policy, asked.prompt, progress, window)
            done = engine.compress(asked.arena, pool, handle, asked.prompt, policy, memory)
            stages = done.stages
            if policy.method == STAR_KV and done.memory is not None:
                self._memories[key] = done.memory
        lengths = pool.kv.lengths[:, pool.slot_of(handle)]
        acted: tuple[str, ...] = ()
        if request is not None and stages is not None:
            acted = components_acted(request, lengths.tolist(), stages)
        return _Kept(float(lengths.mean()), int(lengths.sum()) * pool.kv.row_bytes, acted)
