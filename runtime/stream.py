# SPDX-License-Identifier: Apache-2.0
"""What a session in stream mode holds between two turns, and where a conversation goes on from it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.policy import StarKVMemory

_EMPTY_TURN = r"<\|im_start\|>user\n<\|im_end\|>\n"


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
    """Those that the last reply saw, and its own."""
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
    waiting: ParkedRows | None = None
    """Rows of the newest screenshot that the last reply did without: the next one is read behind them."""

    @property
    def nbytes(self) -> int:
        """Bytes of its rows and of what is known of them."""
        return self.rows.nbytes + (0 if self.waiting is None else self.waiting.nbytes)


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

    A client may have left out the oldest screenshots, as UI-TARS's own does with all but the last five, and
    written special tokens around places, which vanish when a reply is decoded: rendered text is compared
    without image placeholders, without turns that held nothing else, and without those tokens.

    Args:
        state: of the stream.
        text: the whole conversation as the template renders it.
        image_keys: of its screenshots, in order.
        placeholder: text of the image placeholder.
    """
    known, _ = _bare(state.text, placeholder)
    bare, places = _bare(text, placeholder)
    if not known or not bare.startswith(known):
        return None
    split = places[len(known) - 1] + 1
    shown = text.count(placeholder, 0, split)
    hidden = len(state.image_keys) - shown
    if hidden < 0 or tuple(image_keys[:shown]) != state.image_keys[hidden:]:
        return None
    return Continuation(text[split:], shown)


def _bare(text: str, placeholder: str) -> tuple[str, list[int]]:
    """The text without what clients leave out or write otherwise, and where each of its characters was."""
    places = list(range(len(text)))
    image = rf"(?:<\|vision_start\|>)?{re.escape(placeholder)}(?:<\|vision_end\|>)?\n?"
    for pattern in (rf"{image}|<\|box_(?:start|end)\|>", _EMPTY_TURN):
        kept, end = [], 0
        for found in re.finditer(pattern, text):
            kept.append((end, found.start()))
            end = found.end()
        kept.append((end, len(text)))
        places = [place for start, stop in kept for place in places[start:stop]]
        text = "".join(text[start:stop] for start, stop in kept)
    return text, places
