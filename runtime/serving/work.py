# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's thread does with the engine: a piece of one request's prefill, a decode step for all
that decode, and what belongs to both. It knows no queue and no locks."""

from collections.abc import Callable
from contextlib import ExitStack

from starkv.errors import UsageError
from starkv.runtime.engines.base import Engine
from starkv.runtime.kv.buffers import Arena
from starkv.runtime.kv.image_cache import ImageCache
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.serving.job import Job
from starkv.runtime.serving.limits import SchedulerLimits
from starkv.runtime.serving.sessions import ParkedSessions
from starkv.runtime.serving.slots import KvMemory, TurnPool
from starkv.runtime.stream_plan import plan_stream
from starkv.runtime.turn import Turn, decode_step
from starkv.runtime.turn_plan import TurnPlan, fitted, plan_prompt


class EngineWork:
    """Steps jobs through an engine.

    Args:
        engine: is stepped by one thread alone; :meth:`plan` may be called from any.
        tokenizer: the engine's.
        limits: of memory and numbers.
        on_over: told each job that has had its last event.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        limits: SchedulerLimits,
        on_over: Callable[[Job], None],
    ) -> None:
        self._engine, self._tokenizer, self._limits, self._on_over = engine, tokenizer, limits, on_over
        self.memory = KvMemory(engine, limits.kv_bytes, limits.slots)
        self.sessions = ParkedSessions(limits.parked_bytes)
        self.images = ImageCache()
        self.prefilling: Job | None = None
        """The one job that is being read."""
        self._arena: Arena | None = None
        self._decoding: dict[Turn, Job] = {}

    @property
    def any(self) -> bool:
        """Whether there is something to do."""
        return self.prefilling is not None or bool(self.memory.active)

    def plan(self, job: Job) -> Turn:
        """Settle a job's turn.

        Raises:
            UsageError: this engine can't answer it.
        """
        request, manifest = job.request, self._engine.manifest
        if request.session_id is None:
            plan = plan_prompt(manifest, self._tokenizer, request.messages, job.images)
        else:
            state = self.sessions.get(request.session_id)
            plan = plan_stream(
                manifest,
                self._tokenizer,
                request.messages,
                job.images,
                state,
                self._limits.screenshots,
                self._limits.newest_whole,
            )
        plan = fitted(plan, request.parameters.max_new_tokens, manifest)
        for image in job.images:
            if image not in plan.images:
                image.release()
        job.turn = self._turn(job, plan)
        if plan.waiting is not None and self.memory.never_fits(job.turn):
            job.turn = self._turn(job, plan.without_waiting())
        return job.turn

    def _turn(self, job: Job, plan: TurnPlan) -> Turn:
        return Turn(
            self._engine,
            self._tokenizer,
            plan,
            job.request.parameters,
            job.policy,
            plan.state.memory if plan.state else None,
            self.images,
            job.timings,
        )

    def begin(self, job: Job) -> bool:
        """Make a job the one that is being read; False if there is no memory for it now.

        Raises:
            UsageError: it can't be answered, or never fits.
        """
        turn = job.turn or self.plan(job)
        if self.memory.never_fits(turn):
            raise UsageError(
                f"the request needs {turn.plan.arena_rows} KV rows to read it and {turn.slot_rows} to "
                f"answer it, more than {self._limits.kv_bytes >> 20} MiB hold; send fewer or smaller "
                "images, allow fewer new tokens, or give the server more KV memory"
            )
        self._arena = self.memory.arena(turn)
        if self._arena is None:
            return False
        self._arena.reset()
        self.prefilling, job.begun = job, True
        return True

    def read_on(self) -> None:
        """One piece of work for the job that is being read."""
        job = self.prefilling
        if job is None:
            return
        try:
            turn = job.turn
            assert turn is not None
            if turn.encode_next():
                return
            assert self._arena is not None
            if turn.prefill_next(self._arena, self._limits.prefill_rows):
                return
            self._start_decoding(job, turn, self._arena)
        except Exception as error:
            self.prefilling = None
            job.fail(error)
            self._on_over(job)

    def _start_decoding(self, job: Job, turn: Turn, arena: Arena) -> None:
        """Move a prefilled turn into a slot, as soon as there is one."""
        pool = self.memory.slot(turn)
        if pool is None:
            return
        handle = pool.pool.acquire()
        pool.turns[handle] = turn
        job.pool, self.prefilling = pool, None
        self._decoding[turn] = job
        try:
            piece = turn.compress(arena, pool.pool, handle)
        except Exception:
            pool.leave(turn)
            del self._decoding[turn]
            job.pool = None
            raise
        turn.timings.kv_bytes_reserved = self.memory.bytes_reserved
        job.say(piece)
        if turn.reply.finish_reason:
            self._leave(job, turn.reply.finish_reason)

    def decode(self) -> None:
        """One token for every sequence that decodes."""
        for pool in list(self.memory.pools):
            if pool.turns:
                self._decode_pool(pool)

    def _decode_pool(self, pool: TurnPool) -> None:
        turns = pool.in_order
        jobs = [self._decoding[turn] for turn in turns]
        try:
            with ExitStack() as shared:
                for turn in turns:
                    shared.enter_context(turn.timings.measure("decode"))
                pieces = decode_step(self._engine, pool.pool, turns)
        except Exception as error:
            # Nobody knows what the slots hold now.
            self.memory.pools.remove(pool)
            for turn, job in zip(turns, jobs, strict=True):
                del self._decoding[turn]
                job.fail(error)
                self._on_over(job)
            return
        for job, turn, piece in zip(jobs, turns, pieces, strict=True):
            job.say(piece)
            if turn.reply.finish_reason:
                self._leave(job, turn.reply.finish_reason)

    def interrupt(self, job: Job, reason: str) -> None:
        """End a job where it is."""
        if job.pool and job.turn:
            job.say(job.turn.reply.abandon(reason))
            self._leave(job, reason)
            return
        if job is self.prefilling:
            self.prefilling = None
        job.finish(reason)
        self._on_over(job)

    def _leave(self, job: Job, reason: str) -> None:
        """End a reply that decodes: park its session, free its slot, and tell."""
        pool, turn = job.pool, job.turn
        assert pool is not None
        assert turn is not None
        handle = next(handle for handle, other in pool.turns.items() if other is turn)
        state = turn.finish(pool.pool, handle)
        if state is not None and job.request.session_id is not None:
            self.sessions.keep(job.request.session_id, state)
        pool.leave(turn)
        del self._decoding[turn]
        job.finish(reason)
        self._on_over(job)
