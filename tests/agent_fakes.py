# SPDX-License-Identifier: Apache-2.0
"""A model and an environment of an agent that do what a test says."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from starkv.runtime.actions.coordinates import Size, to_json
from starkv.runtime.actions.parser import ActionParseError, parse_response
from starkv.runtime.actions.types import Action
from starkv.runtime.agent import AgentReply
from starkv.runtime.agents.environment import Environment
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.session import Timings

SCREEN = Size(200, 100)
SEEN = Size(100, 50)
"""What the model sees: half of the screen."""
Event = Callable[[], None]


def reply_of(text: str) -> AgentReply:
    """A reply about a screen of ``SCREEN`` pixels, in coordinates of ``SEEN``."""
    actions: tuple[Action, ...] = ()
    thought, error = "", None
    try:
        parsed = parse_response(text)
        actions, thought = parsed.actions, parsed.thought
    except ActionParseError as failure:
        error = failure
    return AgentReply(
        text=text,
        thought=thought,
        actions=actions,
        error=error,
        action_json=tuple(to_json(action, SEEN, SCREEN, "absolute") for action in actions),
        resized=SEEN,
        original=SCREEN,
        finish_reason="stop",
        timings=Timings(prompt_tokens=100, kv_tokens_full=100, kv_tokens_kept=20, kv_bytes_held=3 << 20),
    )


@dataclass
class FakeModel:
    """Says one reply after the other, the last one for ever; an event happens in place of a reply."""

    replies: Iterable[str | Event]
    messages: list[list[Message]] = field(default_factory=list)
    images: list[list[Image.Image]] = field(default_factory=list)
    parameters: list[SamplingParameters] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._left = list(self.replies)

    def __call__(
        self, messages: Sequence[Message], images: Sequence[Image.Image], parameters: SamplingParameters
    ) -> AgentReply:
        self.messages.append(list(messages))
        self.images.append(list(images))
        self.parameters.append(parameters)
        said = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        if callable(said):
            said()
            said = "wait()"
        return reply_of(said)


class Room(Environment):
    """Remembers what was done; every screenshot has a shade of its own."""

    def __init__(self, until: int | None = None) -> None:
        self.performed: list[Action] = []
        self.looks = 0
        self._until = until

    def screenshot(self) -> Image.Image:
        self.looks += 1
        return Image.new("RGB", SCREEN, (self.looks, 0, 0))

    def perform(self, action: Action) -> None:
        self.performed.append(action)

    def done(self) -> bool:
        return self._until is not None and len(self.performed) >= self._until


class DeadRoom(Room):
    """Shows the same whatever is done, but for actions that its test names."""

    def __init__(self, *effective: Action) -> None:
        super().__init__()
        self._effective = effective

    def screenshot(self) -> Image.Image:
        self.looks += 1
        shade = sum(action in self._effective for action in self.performed)
        return Image.new("RGB", SCREEN, (shade, 0, 0))
