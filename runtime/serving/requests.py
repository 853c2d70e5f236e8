# SPDX-License-Identifier: Apache-2.0
"""What is asked of the scheduler, and what it tells while it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from starkv.errors import StarkvError
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.prepared import ImageFacts, PreparedImage
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.timings import Timings


class BusyError(StarkvError):
    """No memory or no place in the queue; the same request may succeed later."""


@dataclass(frozen=True)
class GenerationRequest:
    """One turn of a conversation."""

    messages: Sequence[Message]
    """The whole conversation, with one ``{"type": "image"}`` part per image."""
    images: Sequence[Image.Image | PreparedImage]
    """In the order of their parts; those that the scheduler prepared are for this request only."""
    parameters: SamplingParameters = field(default_factory=SamplingParameters)
    policy: KvPolicy | None = None
    """Which rows of the KV cache are kept; the engine's default otherwise."""
    session_id: str | None = None
    """Stream mode: the session's compacted cache is gone on with where ``messages`` continue what it has
    seen, and begins anew where they don't. Prompt mode without it."""
    timeout_seconds: float | None = None
    """From submission to the last token."""


@dataclass(frozen=True)
class TextPiece:
    """More of the reply's text."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The reply is whole."""

    reason: str
    """``stop``, ``length``, ``cancelled`` or ``timeout``."""
    timings: Timings
    seen: tuple[ImageFacts, ...]
    """Screenshots of the request, as the model saw them: those that this turn added last."""
    reused_tokens: int
    """Tokens of the conversation that a session's cache already held."""


@dataclass(frozen=True)
class Failed:
    """There is no reply."""

    error: StarkvError


Event = TextPiece | Finished | Failed
OnEvent = Callable[[Event], None]
"""Called on the scheduler's thread; must not block."""


@dataclass(frozen=True)
class SequenceStatus:
    """What one sequence is doing."""

    id: int
    state: str
    """``queued``, ``prefill`` or ``decode``."""
    session_id: str | None
    prompt_tokens: int
    generated_tokens: int
    kv_tokens_kept: float
    seconds: float
    """Since submission."""


@dataclass(frozen=True)
class SchedulerStatus:
    """What a scheduler is doing."""

    sequences: tuple[SequenceStatus, ...]
    parked_sessions: int
    """Sessions that wait for their next turn, in host memory."""
    parked_bytes: int
    kv_bytes_held: int
    kv_bytes_reserved: int
    kv_bytes_limit: int
    slots: int
    """Most sequences that decode at once."""
    queue_limit: int
