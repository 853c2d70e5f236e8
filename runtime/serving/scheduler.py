# SPDX-License-Identifier: Apache-2.0
"""Many sessions on one engine: decode steps for all of them together, and in between a piece of one prefill.

One thread steps the engine. Each round does one piece of work for the request that is being prefilled (an
image, a chunk, or the compression) and one decode step for every pool, so nobody waits longer than a piece
for a token. Requests are taken in the order in which they came.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable

from starkv.runtime.agent import default_policy
from starkv.runtime.engines.base import Engine, check_kv_method
from starkv.runtime.preprocess.prepared import PreparedImage
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.serving.job import Job
from starkv.runtime.serving.limits import SchedulerLimits
from starkv.runtime.serving.requests import BusyError, GenerationRequest, OnEvent, SchedulerStatus
from starkv.runtime.serving.work import EngineWork
from starkv.runtime.timings import Timings

IDLE_SECONDS = 0.05
"""How often waiting requests are looked at for their time limits while nothing runs."""


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
        self._engine = engine
        self._limits = limits or SchedulerLimits()
        self._work = EngineWork(engine, tokenizer, self._limits, self._forget)
        self._ids = itertools.count(1)
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}
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
        check_kv_method(self._engine.info, policy.method, bool(policy.packed))
        images = tuple(
            image if isinstance(image, PreparedImage) else self._work.images.prepare(image, manifest)
            for image in request.images
        )
        timings = Timings(preprocess_ms=sum(image.milliseconds for image in images))
        job = Job(next(self._ids), request, on_event, policy, images, timings)
        if request.session_id is None:
            # What a session adds is known only when its turn before is over; all else is refused right here.
            self._work.plan(job)
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
        return self._work.images.prepare(source, self._engine.manifest, most_pixels, on_pixels)

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
            parked_sessions=len(self._work.sessions),
            parked_bytes=self._work.sessions.nbytes,
            kv_bytes_held=self._work.memory.bytes_held,
            kv_bytes_reserved=self._work.memory.bytes_reserved,
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
            self._admit()
            self._work.read_on()
            self._work.decode()

    def _has_work(self) -> bool:
        if self._work.any:
            return True
        return any(job.interruption for job in self._jobs.values()) or bool(self._queue)

    def _interrupt(self) -> None:
        """End requests that were cancelled or took too long."""
        for job in list(self._jobs.values()):
            if reason := job.interruption:
                self._work.interrupt(job, reason)

    def _admit(self) -> None:
        """Begin with the next request, if nobody is being read and there is memory for it."""
        if self._work.prefilling:
            return
        with self._changed:
            busy = {job.request.session_id for job in self._jobs.values() if job.pool} - {None}
            job = next((job for job in self._queue if job.request.session_id not in busy), None)
        if job is None:
            return
        try:
            begun = self._work.begin(job)
        except Exception as error:
            job.fail(error)
            self._forget(job)
            return
        if begun:
            with self._changed:
                self._queue.remove(job)

    def _forget(self, job: Job) -> None:
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
            self._jobs.pop(job.id, None)
            self._changed.notify_all()
