# SPDX-License-Identifier: Apache-2.0
"""A request on its way through the scheduler."""

import logging
import time
from dataclasses import dataclass, field

from starkv.errors import EngineError, StarkvError
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.prepared import PreparedImage
from starkv.runtime.serving.requests import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    OnEvent,
    SequenceStatus,
    TextPiece,
)
from starkv.runtime.serving.slots import TurnPool
from starkv.runtime.timings import Timings
from starkv.runtime.turn import Turn

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One request with all that is known of it."""

    id: int
    request: GenerationRequest
    on_event: OnEvent
    policy: KvPolicy
    images: tuple[PreparedImage, ...]
    timings: Timings
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    turn: Turn | None = None
    """Once it is planned."""
    begun: bool = False
    """It is out of the queue."""
    pool: TurnPool | None = None
    """Once it decodes."""

    @property
    def interruption(self) -> str | None:
        """Why it should end before its time."""
        if self.cancelled:
            return "cancelled"
        limit = self.request.timeout_seconds
        return "timeout" if limit is not None and time.monotonic() - self.submitted > limit else None

    @property
    def status(self) -> SequenceStatus:
        turn = self.turn
        state = "decode" if self.pool else "prefill" if self.begun else "queued"
        return SequenceStatus(
            self.id,
            state,
            self.request.session_id,
            turn.timings.prompt_tokens if turn else 0,
            turn.timings.generated_tokens if turn else 0,
            turn.timings.kv_tokens_kept if turn else 0.0,
            time.monotonic() - self.submitted,
        )

    def say(self, text: str) -> None:
        """Tell of more text, if there is any."""
        if text:
            self._tell(TextPiece(text))

    def finish(self, reason: str) -> None:
        """Tell that the reply is whole."""
        reused = self.turn.plan.reused_tokens if self.turn else 0
        seen = tuple(image.facts for image in self.images)
        self._tell(Finished(reason, self.timings, seen, reused))

    def fail(self, error: Exception) -> None:
        """Tell that there is no reply. What is no known error is a bug: it is logged, and told as one."""
        if not isinstance(error, StarkvError):
            log.error("request %d failed", self.id, exc_info=error)
            error = EngineError(f"internal error: {type(error).__name__}; see the server's log")
        self._tell(Failed(error))

    def _tell(self, event: Event) -> None:
        try:
            self.on_event(event)
        except Exception:
            # A listener that is gone must not take the others with it.
            log.exception("the listener of request %d failed; the request is cancelled", self.id)
            self.cancelled = True
