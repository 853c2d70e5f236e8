# SPDX-License-Identifier: Apache-2.0
"""What many sessions together may take."""

from dataclasses import dataclass

from starkv.errors import UsageError


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
    newest_whole: bool = True
    """Whether a session's newest screenshot stays whole, in host memory, until the next one was read behind
    it."""

    def __post_init__(self) -> None:
        for name in ("slots", "queue", "kv_bytes", "prefill_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
