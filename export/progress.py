# SPDX-License-Identifier: Apache-2.0
"""How long work reports its progress, without knowing who shows it."""

from typing import Protocol


class Progress(Protocol):
    """Receives progress; the command line draws a bar from it."""

    def start(self, stage: str, total: int) -> None:
        """Begin ``stage``, which takes ``total`` steps; the stage before it is over."""

    def advance(self, item: str) -> None:
        """One step of the current stage is done: ``item``."""


class NoProgress:
    """Ignores all progress."""

    def start(self, stage: str, total: int) -> None:
        return None

    def advance(self, item: str) -> None:
        return None
