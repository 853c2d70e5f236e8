# SPDX-License-Identifier: Apache-2.0
"""Picking the next token, and where a reply ends."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError


@dataclass(frozen=True)
class SamplingParameters:
    """How tokens are drawn and when a reply is over."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token; otherwise logits are divided by it before drawing."""
    top_p: float = 1.0
    """Draw among the likeliest tokens whose probabilities reach this sum."""
    seed: int | None = None
    """Makes drawing repeatable; a fresh seed per reply if None."""
    stop: tuple[str, ...] = ()
    """The reply ends before whichever of these strings is complete first."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not self.temperature >= 0.0 or np.isinf(self.temperature):
            raise UsageError(f"temperature must be a number ≥ 0, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed must be at least 0, not {self.seed}")
        if "" in self.stop:
            raise UsageError("a stop string must not be empty")


@dataclass(frozen=True)
class Draw:
    """How one token is picked, for a device that does it."""

    temperature: float
    """0 takes the most likely token."""
    top_p: float
    uniform: float
    """Drawn in [0, 1)."""


class Sampler:
    """Draws tokens by the parameters of one reply."""

    def __init__(self, parameters: SamplingParameters) -> None:
        self._parameters = parameters
        self._random = np.random.default_rng(parameters.seed)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """Choose a token from ``logits`` ``[vocab]``; ties go to the lower id."""
        if self._parameters.temperature == 0.0:
            return int(logits.argmax())
        below_best = logits.astype(np.float64) - logits.max()
        # A temperature near zero may make them infinite, which is right: only the best tokens are left.
        with np.errstate(over="ignore"):
            probabilities = np.exp(below_best / self._parameters.temperature)
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        # A token belongs to the nucleus if those before it don't reach top_p yet: there is always one.
        before = np.cumsum(probabilities[order]) - probabilities[order]
        nucleus = order[before < self._parameters.top_p]
        shares = probabilities[nucleus] / probabilities[nucleus].sum()
        return int(self._random.choice(nucleus, p=shares))

    def draw(self) -> Draw:
        """What a device needs to pick the next token; takes one number from the reply's random ones."""
        greedy = self._parameters.temperature == 0.0
        uniform = 0.0 if greedy else float(self._random.random(dtype=np.float32))
        return Draw(self._parameters.temperature, self._parameters.top_p, uniform)


class StopScanner:
    """Cuts a stream of text where a stop string begins, giving out nothing that could still become one.

    The stop string that is complete first counts, and of several that end together the longest: so the result
    does not depend on how the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Add text; returns what is certain to belong to the reply."""
        self._held += piece
        places = [(self._held.find(text), text) for text in self._stop]
        found = [(place + len(text), place) for place, text in places if place >= 0]
        if found:
            self.stopped = True
            _, place = min(found)
            certain, self._held = self._held[:place], ""
            return certain
        longest = max((self._beginning(text) for text in self._stop), default=0)
        cut = len(self._held) - longest
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self) -> str:
        """Give out what was held back."""
        certain, self._held = self._held, ""
        return certain

    def _beginning(self, text: str) -> int:
        """Length of the longest beginning of ``text`` that the held text ends with."""
        return next(
            (n for n in range(min(len(text) - 1, len(self._held)), 0, -1) if self._held.endswith(text[:n])), 0
        )
