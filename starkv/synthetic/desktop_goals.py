# SPDX-License-Identifier: Apache-2.0
"""Goals on a desktop: elements that have to be clicked in order, each on the screen when its turn comes."""

from dataclasses import dataclass, replace

import numpy as np

from starkv.synthetic.desktop import Desktop
from starkv.synthetic.widgets import Name

_GOAL = 2
"""Which part of a desktop's randomness; see ``desktop``."""
_OPENING = 0.4
"""Share of steps that open something where something can be opened."""


@dataclass(frozen=True)
class Goal:
    """Elements to be clicked, and how far it has come."""

    steps: tuple[Name, ...]
    reached: int = 0
    """Steps that were done."""
    missed: bool = False
    """Whether something else was clicked."""

    def __str__(self) -> str:
        return f"Do: {', '.join(map(str, self.steps))}."

    @property
    def next_step(self) -> Name | None:
        """What is to be clicked now; None where that is nothing any more."""
        return None if self.missed or self.fulfilled else self.steps[self.reached]

    @property
    def fulfilled(self) -> bool:
        """Whether all was clicked in order, and nothing else."""
        return not self.missed and self.reached == len(self.steps)

    def after(self, clicked: Name) -> "Goal":
        """The goal after a click on an element.

        The element of the step before may be clicked again, because what it opened may have been closed; any
        other that is not the next step misses the goal for good.
        """
        if self.missed or self.fulfilled or (self.reached and clicked == self.steps[self.reached - 1]):
            return self
        if clicked == self.steps[self.reached]:
            return replace(self, reached=self.reached + 1)
        return replace(self, missed=True)


def random_goal(desktop: Desktop, steps: int) -> Goal:
    """A goal of ``steps`` different elements, found by clicking one after the other; at least one, and fewer
    than ``steps`` only where a desktop has no more. It is the same for the same desktop."""
    random = np.random.default_rng([desktop.seed, _GOAL])
    names: list[Name] = []
    while len(names) < steps:
        left = [element for element in desktop.clickable if element.name not in names]
        if not left:
            break
        opening = [element for element in left if element.name in desktop.contents]
        if opening and random.random() < _OPENING:
            left = opening
        element = left[int(random.integers(len(left)))]
        names.append(element.name)
        desktop, _ = desktop.press(*element.center)
    return Goal(tuple(names))
