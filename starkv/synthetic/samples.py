# SPDX-License-Identifier: Apache-2.0
"""A question about screenshots, its right answer, and the box in which a click counts."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from starkv.synthetic.widgets import Box


class Evidence(NamedTuple):
    """Part of a screenshot that an answer is about."""

    frame: int
    """Number of the screenshot in the sample, 0 the oldest."""
    box: Box


@dataclass(frozen=True)
class Sample:
    """One question. A model sees all frames, oldest first, and then the text."""

    id: str
    """Unique within a suite, the same for the same split, seed and number."""
    task: str
    """One of ``CLICK_TASKS`` or ``TRAJECTORY_TASKS``."""
    group: str
    """Questions of one screen or one episode; a suite yields them one after the other, in order."""
    frames: tuple[NDArray[np.uint8], ...]
    """Screenshots ``[H, W, 3]``, oldest first; the last is what the user sees. All have one size."""
    question: str
    answer: str
    """The whole right reply."""
    box: Box
    """Where a click counts, in pixels of the last frame."""
    evidence: tuple[Evidence, ...]
    """Everything that is needed to answer: what an oracle would keep."""

    def hit(self, x: float, y: float) -> bool:
        """Whether a click at this pixel of the last frame is right."""
        x0, y0, x1, y1 = self.box
        return x0 <= x < x1 and y0 <= y < y1

    def distance(self, x: float, y: float) -> float:
        """Pixels from a point to the middle of the box."""
        x0, y0, x1, y1 = self.box
        return float(np.hypot(x - (x0 + x1) / 2, y - (y0 + y1) / 2))
