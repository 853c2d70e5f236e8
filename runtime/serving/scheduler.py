# SPDX-License-Identifier: Apache-2.0
"""Many sessions on one engine: decode steps for all of them together, and in between a piece of one prefill.

One thread steps the engine. Each round does one piece of work for the request that is being prefilled (an
image, a chunk, or the compression) and one decode step for every pool, so nobody waits longer than a piece
for a token. Requests are taken in the order in which they came.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from starkv.errors import UsageError
from starkv.runtime.agent import default_policy
from starkv.runtime.engines.base import Engine, check_kv_method
from starkv.runtime.kv.buffers import Arena
from starkv.runtime.kv.image_cache import ImageCache
from starkv.runtime.preprocess.prepared import PreparedImage
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.serving.job import Job
from starkv.runtime.serving.requests import BusyError, GenerationRequest, OnEvent, SchedulerStatus
from starkv.runtime.serving.sessions import ParkedSessions
from starkv.runtime.serving.slots import KvMemory, TurnPool
from starkv.runtime.stream_plan import plan_stream
from starkv.runtime.timings import Timings
from starkv.runtime.turn import Turn, decode_step
from starkv.runtime.turn_plan import check_fits, plan_prompt

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.05
"""How often waiting requests are looked at for their time limits while nothing runs."""


@dataclass(frozen=True)
class SchedulerLimits:
    """What many sessions together may take."""

    slots: int = 8
    """Sequences that decode at once."""
    queue: int = 64
    """Requests that wait."""
    kv_bytes: int = 4 * 2**30
    """Keys and values of the arena and of all slots."""
    parked_bytes: int = 4 * 2**30
    """Keys and values, in host memory, of sessions between their turns."""
    prefill_rows: int = 512
    """Of one piece of a prefill: how long the others wait for their next token."""
    screenshots: int | None = None
    """Of a session's stream in view."""

    def __post_init__(self) -> None:
        for name in ("slots", "queue", "kv_bytes", "prefill_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")


class Scheduler:
    """Answers requests; all methods may be called from any thread.

    Args:
        engine: is stepped by the scheduler's thread alone.
        tokenizer: the engine's.
        limits: of memory and numbers.
    """

    def __init__(
        self, engine: Engine, tokenizer: ChatTokenizer, limits: SchedulerLimits | None = None
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._limits = limits or SchedulerLimits()
        self._memory = KvMemory(engine, self._limits.kv_bytes, self._limits.slots)
        self._sessions = ParkedSessions(self._limits.parked_bytes)
        self._images = ImageCache()
        self._ids = itertools.count(1)
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}
        self._prefilling: Job | None = None
        self._arena: Arena | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="starkv-scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> int:
        """Take a request; its reply comes through ``on_event``, on the scheduler's thread.

        Images are prepared on the caller's thread.

        Returns:
            the number to cancel it by.

        Raises:
            BusyError: the queue is full, or the scheduler is closing.
            ImageError: an image can't be taken.
            UsageError: the request can't be answered by this engine.
        """
        self._check_open()
        manifest = self._engine.manifest
        policy = request.policy or default_policy(manifest)
        check_kv_method(self._engine.info, policy.method)
        timings = Timings()
        with timings.measure("preprocess"):
            images = tuple(
                image if isinstance(image, PreparedImage) else self._images.prepare(image, manifest)
                for image in request.images
            )
        job = Job(next(self._ids), request, on_event, policy, images, timings)
        if request.session_id is None:
            # What a session adds is known only when its turn before is over; all else is refused right here.
            self._plan(job)
        with self._changed:
            self._check_open()
            self._queue.append(job)
            self._jobs[job.id] = job
            self._changed.notify()
        return job.id

    def prepare(self, source: bytes, most_pixels: int, on_pixels: Callable[[int], None]) -> PreparedImage:
        """Prepare an image for one request, on the caller's thread; see ``ImageCache.prepare``.

        Raises:
            ImageError: the image can't be taken.
        """
        return self._images.prepare(source, self._engine.manifest, most_pixels, on_pixels)

    def cancel(self, id: int) -> None:
        """End a request's reply where it is; nothing happens to one that is over."""
        with self._changed:
            if id in self._jobs:
                self._jobs[id].cancelled = True
                self._changed.notify()

    def status(self) -> SchedulerStatus:
        """What is going on."""
        with self._changed:
            jobs = tuple(job.status for job in self._jobs.values())
        return SchedulerStatus(
            sequences=jobs,
            parked_sessions=len(self._sessions),
            parked_bytes=self._sessions.nbytes,
            kv_bytes_held=self._memory.bytes_held,
            kv_bytes_reserved=self._memory.bytes_reserved,
            kv_bytes_limit=self._limits.kv_bytes,
            slots=self._limits.slots,
            queue_limit=self._limits.queue,
        )

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Take no more requests, answer those that are there, and cancel what is left after the timeout."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_seconds)
        with self._changed:
            for job in self._jobs.values():
                job.cancelled = True
            self._changed.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closing:
            raise BusyError("the server is shutting down; try again later")
        if len(self._queue) >= self._limits.queue:
            raise BusyError(
                f"{len(self._queue)} requests are waiting, the most there may be; try again later"
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._has_work() and not (self._closing and not self._jobs):
                    # Woken to look at time limits while a request waits for memory that nobody frees.
                    self._changed.wait(IDLE_SECONDS if self._jobs else None)
                if self._closing and not self._jobs:
                    return
            self._interrupt()
            self._advance_prefill()
            for pool in list(self._memory.pools):
                if pool.turns:
                    self._decode(pool)

    def _has_work(self) -> bool:
        if self._prefilling or self._memory.active:
            return True
        return any(job.interruption for job in self._jobs.values()) or bool(self._queue)

    def _interrupt(self) -> None:
        """End requests that were cancelled or took too long."""
        for job in list(self._jobs.values()):
            reason = job.interruption
            if not reason:
                continue
            if job.pool and job.turn:
                job.say(job.turn.reply.abandon(reason))
                self._leave(job, reason)
            else:
                if job is self._prefilling:
                    self._prefilling = None
                job.finish(reason)
                self._forget(job)

    def _advance_prefill(self) -> None:
        """One piece of work for one request."""
        job = self._prefilling or self._admit()
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
            self._start_decoding(job, turn)
        except Exception as error:
            self._prefilling = None
            job.fail(error)
            self._forget(job)

    def _start_decoding(self, job: Job, turn: Turn) -> None:
        """Move a prefilled turn into a slot, as soon as there is one."""
        pool = self._memory.slot(turn)
        if pool is None:
            return
        assert self._arena is not None
        handle = pool.pool.acquire()
        pool.turns[handle] = turn
        job.pool, self._prefilling = pool, None
        try:
            piece = turn.compress(self._arena, pool.pool, handle)
        except Exception:
            pool.leave(turn)
            job.pool = None
            raise
        turn.timings.kv_bytes_reserved = self._memory.bytes_reserved
        job.say(piece)
        if turn.reply.finish_reason:
            self._leave(job, turn.reply.finish_reason)

    def _admit(self) -> Job | None:
        """The next request that may begin, with an arena for it."""
        with self._changed:
            busy = {job.request.session_id for job in self._jobs.values() if job.pool} - {None}
            job = next((job for job in self._queue if job.request.session_id not in busy), None)
        if job is None:
            return None
        try:
            turn = job.turn or self._plan(job)
            if self._memory.never_fits(turn):
                raise UsageError(
                    f"the request needs {turn.plan.arena_rows} KV rows to read it and {turn.slot_rows} to "
                    f"answer it, more than {self._limits.kv_bytes >> 20} MiB hold; send fewer or smaller "
                    "images, allow fewer new tokens, or give the server more KV memory"
                )
            self._arena = self._memory.arena(turn)
        except Exception as error:
            with self._changed:
                self._queue.remove(job)
            job.fail(error)
            self._forget(job)
            return None
        if self._arena is None:
            return None
        self._arena.reset()
        with self._changed:
            self._queue.remove(job)
        self._prefilling, job.begun = job, True
        return job

    def _plan(self, job: Job) -> Turn:
        request, manifest = job.request, self._engine.manifest
        if request.session_id is None:
            plan = plan_prompt(manifest, self._tokenizer, request.messages, job.images)
        else:
            state = self._sessions.get(request.session_id)
            plan = plan_stream(
                manifest, self._tokenizer, request.messages, job.images, state, self._limits.screenshots
            )
        check_fits(plan, request.parameters.max_new_tokens, manifest)
        for image in job.images:
            if image not in plan.images:
                image.release()
        memory = plan.state.memory if plan.state else None
        job.turn = Turn(
            self._engine,
            self._tokenizer,
            plan,
            request.parameters,
            job.policy,
            memory,
            self._images,
            job.timings,
        )
        return job.turn

    def _decode(self, pool: TurnPool) -> None:
        """One token for every sequence of a pool."""
        turns = pool.in_order
        try:
            with ExitStack() as shared:
                for turn in turns:
                    shared.enter_context(turn.timings.measure("decode"))
                pieces = decode_step(self._engine, pool.pool, turns)
        except Exception as error:
            # Nobody knows what the slots hold now.
            self._memory.pools.remove(pool)
            for job in self._jobs_of(turns):
                job.fail(error)
                self._forget(job)
            return
        for job, turn, piece in zip(self._jobs_of(turns), turns, pieces, strict=True):
            job.say(piece)
            if turn.reply.finish_reason:
                self._leave(job, turn.reply.finish_reason)

    def _jobs_of(self, turns: list[Turn]) -> list[Job]:
        of_turn = {id(job.turn): job for job in self._jobs.values()}
        return [of_turn[id(turn)] for turn in turns]

    def _leave(self, job: Job, reason: str) -> None:
        """End a reply that decodes: park its session, free its slot, and tell."""
        pool, turn = job.pool, job.turn
        assert pool is not None
        assert turn is not None
        handle = next(handle for handle, other in pool.turns.items() if other is turn)
        state = turn.finish(pool.pool, handle)
        if state is not None and job.request.session_id is not None:
            self._sessions.keep(job.request.session_id, state)
        pool.leave(turn)
        job.finish(reason)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
            self._jobs.pop(job.id, None)
            self._changed.notify_all()
