# SPDX-License-Identifier: Apache-2.0
"""What is written down of an agent's run: each step, and how it ended."""

from dataclasses import asdict, dataclass, field
from typing import Literal

from starkv.runtime.actions.coordinates import JsonValue

Reason = Literal[
    "done", "finished", "call_user", "steps", "time", "unreadable", "stuck", "interrupted", "error"
]
"""Why a run ended: the environment had nothing more to do; the model said that it has finished, or that it
needs the user; the limit of steps or of time; replies that are no actions; replies that do what changed
nothing before; Ctrl-C; an error."""


@dataclass(frozen=True)
class Rejected:
    """A reply that was no action, or one that was tried often enough."""

    text: str
    error: str
    """What is wrong with it."""


@dataclass
class Step:
    """One look at the screen and what came of it; filled as it happens, so that an interrupted one tells how
    far it got. Times in milliseconds."""

    number: int
    """From 1."""
    screenshot_wh: tuple[int, int] = (0, 0)
    """Pixels of the screenshot."""
    unchanged: int = 0
    """Steps in a row, before this one, that showed the very same screen."""
    text: str = ""
    """The reply as the model wrote it."""
    thought: str = ""
    actions: list[dict[str, JsonValue]] = field(default_factory=list)
    """What the reply asks for, with ``model_xy`` and ``screen_xy``."""
    performed: int = 0
    """How many of them were carried out."""
    retries: int = 0
    """Times that the model was asked again."""
    rejected: list[Rejected] = field(default_factory=list)
    """Replies that were not acted on, in order."""
    error: str | None = None
    """What went wrong."""
    screenshot_ms: float = 0.0
    ask_ms: float = 0.0
    """All questions of the step."""
    perform_ms: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    """Of the last reply: times of the engine, tokens, ``kv_tokens_kept``, ``kv_bytes_held``, …"""

    def to_json(self) -> dict[str, object]:
        """As JSON values, times and figures to thousandths."""
        values = asdict(self)
        for name in ("screenshot_ms", "ask_ms", "perform_ms"):
            values[name] = round(values[name], 3)
        values["timings"] = {name: round(value, 3) for name, value in self.timings.items()}
        return values


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    reason: Reason
    success: bool | None
    """Whether the goal is reached, as far as the environment can tell."""
    steps: int
    """Steps that were begun."""
    seconds: float
    message: str = ""
    """What the model says with ``finished`` or ``call_user``."""
    error: str | None = None
    """What went wrong, where the reason is ``error``, ``unreadable`` or ``stuck``."""

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}
