# SPDX-License-Identifier: Apache-2.0
"""Boxes on a screen, and the two conventions in which data sets write them down."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle, in whatever unit its data set has: pixels, or shares of the screen's sides."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def from_xywh(cls, values: Sequence[float]) -> "Box":
        """From ``[x, y, width, height]``.

        Raises:
            ValueError: these are not four numbers, or the box is empty.
        """
        left, top, width, height = values
        return cls._checked(left, top, left + width, top + height)

    @classmethod
    def from_xyxy(cls, values: Sequence[float]) -> "Box":
        """From ``[left, top, right, bottom]``.

        Raises:
            ValueError: these are not four numbers, or the box is empty.
        """
        left, top, right, bottom = values
        return cls._checked(left, top, right, bottom)

    @classmethod
    def _checked(cls, left: float, top: float, right: float, bottom: float) -> "Box":
        if right <= left or bottom <= top:
            raise ValueError(f"the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) is empty")
        return cls(left, top, right, bottom)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)

    def distance(self, x: float, y: float) -> float:
        """From a point to the middle of the box, in the box's unit."""
        return math.hypot(x - (self.left + self.right) / 2, y - (self.top + self.bottom) / 2)

    def holds(self, x: float, y: float) -> bool:
        """Whether a point lies in the box; its edges belong to it."""
        return self.left <= x <= self.right and self.top <= y <= self.bottom
