# SPDX-License-Identifier: Apache-2.0
"""From the scheduler's thread to the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from starkv.runtime.preprocess.prepared import PreparedImage
from starkv.runtime.serving.requests import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    OnEvent,
    SchedulerStatus,
)


class SchedulerLike(Protocol):
    """What the server needs of a scheduler, see ``starkv.runtime.serving.scheduler``."""

    def prepare(self, source: bytes, most_pixels: int, on_pixels: Callable[[int], None]) -> PreparedImage: ...

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> int: ...

    def cancel(self, id: int) -> None: ...

    def status(self) -> SchedulerStatus: ...

    def close(self, timeout_seconds: float) -> None: ...


class Bridge:
    """One request's events, as they come, on the event loop. Leaving cancels what is not over.

    A client that never reads costs its own events, which its reply's length bounds; the scheduler never
    waits for anybody.
    """

    def __init__(self, scheduler: SchedulerLike) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._id: int | None = None
        self._over = False

    async def submit(self, request: GenerationRequest) -> None:
        """Hand a request over; planning takes a thread, not the loop.

        Raises:
            StarkvError: the scheduler doesn't take it.
        """
        self._id = await asyncio.to_thread(self._scheduler.submit, request, self._listen)

    async def events(self, patience_seconds: float) -> AsyncIterator[Event | None]:
        """Events to the last one; None whenever none came for so long."""
        coming: asyncio.Task[Event] | None = None
        try:
            while not self._over:
                # Not ``wait_for``: before Python 3.12 it may swallow the cancellation of who waits.
                coming = coming or asyncio.create_task(self._events.get())
                await asyncio.wait({coming}, timeout=patience_seconds)
                if not coming.done():
                    yield None
                    continue
                event, coming = coming.result(), None
                self._over = isinstance(event, (Finished, Failed))
                yield event
        finally:
            if coming is not None:
                coming.cancel()

    def leave(self) -> None:
        """Nobody listens any more."""
        if self._id is not None and not self._over:
            self._scheduler.cancel(self._id)

    def _listen(self, event: Event) -> None:
        # Called on the scheduler's thread. A loop that is closed has nobody left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
