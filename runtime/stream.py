# SPDX-License-Identifier: Apache-2.0
"""What a session in stream mode holds between two turns, and where a conversation goes on from it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.policy import StarKVMemory

_TAIL = 24
"""Characters at the end of the known text that are looked for before the whole is compared."""
_EMPTY_TURN = re.compile(r"<\|im_start\|>user\n<\|im_end\|>\n")


@dataclass(frozen=True)
class FrameInView:
    """A screenshot of which the cache may hold rows."""

    number: int
    """In the stream."""
    tokens: int


@dataclass(frozen=True)
class StreamState:
    """A session's cache and what it stands for."""

    rows: ParkedRows
    text: str
    """The conversation as the template renders it, up to the end of the last reply."""
    image_keys: tuple[bytes, ...]
    """Of every screenshot so far."""
    pending: tuple[int, ...]
    """Tokens at the end of ``text`` that are no rows yet."""
    next_position: int
    tokens: int
    """Of the whole stream, evicted ones included."""
    frames: tuple[FrameInView, ...]
    """Those that the window still shows, oldest first."""
    protect_order: tuple[int, ...]
    """Tokens worth keeping, the most important first."""
    memory: StarKVMemory | None = field(default=None, repr=False)
    evicted_tokens: int = 0
    """Of screenshots that left the window."""


@dataclass(frozen=True)
class Continuation:
    """What a conversation adds to a stream."""

    text: str
    first_image: int
    """Number, in the conversation, of the first screenshot that is new."""


def continuation(
    state: StreamState, text: str, image_keys: Sequence[bytes], placeholder: str
) -> Continuation | None:
    """Where a conversation goes on from a stream; None if it is another conversation.

    A client may have left out the oldest screenshots, as UI-TARS's own does with all but the last five:
    rendered text is compared without image placeholders and without turns that held nothing else.

    Args:
        state: of the stream.
        text: the whole conversation as the template renders it.
        image_keys: of its screenshots, in order.
        placeholder: text of the image placeholder.
    """
    tail = state.text[-_TAIL:]
    known = _without_images(state.text, placeholder)
    end = text.find(tail)
    while end >= 0:
        split = end + len(tail)
        shown = text.count(placeholder, 0, split)
        if (
            _without_images(text[:split], placeholder) == known
            and shown <= len(state.image_keys)
            and tuple(image_keys[:shown]) == state.image_keys[len(state.image_keys) - shown :]
        ):
            return Continuation(text[split:], shown)
        end = text.find(tail, end + 1)
    return None


def _without_images(text: str, placeholder: str) -> str:
    bare = re.sub(rf"(<\|vision_start\|>)?{re.escape(placeholder)}(<\|vision_end\|>)?\n?", "", text)
    return _EMPTY_TURN.sub("", bare)
