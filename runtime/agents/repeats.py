# SPDX-License-Identifier: Apache-2.0
"""Notices a model that does the same again and again to a screen that does not care."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from starkv.runtime.actions.types import Action, CallUser, Finished, Wait


class Repeats:
    """What was tried on the screen since it last changed.

    Screens are the same if all their pixels are: a counter that goes up is a change, and so is a clock.

    Args:
        most: times that the same actions may be tried on one screen; 0: as often as the model likes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._screen = b""
        self._tried: Counter[tuple[Action, ...]] = Counter()
        self.unchanged = 0
        """Steps in a row, before this one, that showed this very screen."""

    def look(self, screen: Image.Image) -> None:
        """See the screen of a new step."""
        seen = hashlib.blake2b(repr((screen.mode, screen.size)).encode() + screen.tobytes()).digest()
        if seen == self._screen:
            self.unchanged += 1
        else:
            self._screen, self.unchanged = seen, 0
            self._tried.clear()

    def useless(self, actions: Sequence[Action]) -> str | None:
        """Why these actions are not worth another try; None if they are.

        Waiting may be repeated, since it hopes for a change that comes by itself. What ends the run may, too.
        """
        tried = self._tried[tuple(actions)]
        if not self._most or tried < self._most:
            return None
        if any(isinstance(action, Finished | CallUser) for action in actions):
            return None
        if all(isinstance(action, Wait) for action in actions):
            return None
        return f"done {tried} times on this same screen without any change"

    def tried(self, actions: Sequence[Action]) -> None:
        """Note what is about to be done to the screen."""
        self._tried[tuple(actions)] += 1
