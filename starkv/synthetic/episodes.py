# SPDX-License-Identifier: Apache-2.0
"""Episodes: a screen that changes from step to step while somebody clicks on it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from starkv.synthetic.layout import Names, place_new, random_scene
from starkv.synthetic.questions import (
    Question,
    changed_question,
    current_questions,
    earlier_questions,
    instruction_question,
)
from starkv.synthetic.scene import Element, Scene, find_place, render
from starkv.synthetic.widgets import Canvas, Name

FEWEST_FRAMES, MOST_FRAMES = 3, 5
"""Screenshots in view."""
LEAST_ELEMENTS = 5
_TRIES = 20
"""Elements tried until one fits."""


@dataclass(frozen=True)
class Episode:
    """States of a screen, and what was clicked in each of them."""

    scenes: tuple[Scene, ...]
    clicks: tuple[Name, ...]
    """Name of the element that was clicked in each scene."""

    def frames(self, end: int, count: int) -> tuple[Canvas, ...]:
        """Screenshots before step ``end``: ``count`` of them, the last of scene ``end``.

        The pointer shows what was clicked; in the last one nothing was clicked yet.
        """
        earlier = range(end - count + 1, end)
        return (*(self.pointed(step) for step in earlier), render(self.scenes[end]))

    def pointed(self, step: int) -> Canvas:
        """The screenshot of a scene with the pointer at what was clicked."""
        clicked = self.scenes[step].find(self.clicks[step])
        return render(self.scenes[step], clicked.box if clicked else None)

    def questions(self, random: np.random.Generator, end: int, count: int) -> dict[str, Iterator[Question]]:
        """Task → questions that can be asked where scenes ``end - count + 1`` … ``end`` are in view."""
        view = self.scenes[end - count + 1 : end + 1]
        changed = changed_question(random, view)
        return {
            "current": current_questions(random, view),
            "earlier": earlier_questions(random, view),
            "changed": iter([changed] if changed else []),
            "instruction": self._instructions(random, view, self.clicks[end - 1]),
        }

    @staticmethod
    def _instructions(
        random: np.random.Generator, view: tuple[Scene, ...], clicked: Name
    ) -> Iterator[Question]:
        elements = view[-1].elements
        for index in random.permutation(len(elements)):
            if elements[index].name != clicked:
                yield instruction_question(random, view, clicked, elements[index])


def random_episode(
    random: np.random.Generator, steps: int, height: int, width: int, fewest: int, most: int
) -> Episode:
    """An episode of ``steps`` scenes that begin with ``fewest`` to ``most`` elements.

    From one scene to the next either some elements move, or one that was not there before appears; often
    one goes away.
    """
    scene, names = random_scene(random, height, width, fewest, most)
    scenes = [scene]
    while len(scenes) < steps:
        scene = _next(random, scene, names)
        scenes.append(scene)
    clicks = tuple(s.elements[random.integers(len(s.elements))].name for s in scenes)
    return Episode(tuple(scenes), clicks)


def _next(random: np.random.Generator, scene: Scene, names: Names) -> Scene:
    elements = list(scene.elements)
    if len(elements) > LEAST_ELEMENTS and random.random() < 0.8:
        elements.pop(int(random.integers(len(elements))))
    if random.random() < 0.5:
        count = int(random.integers(1, 4))
        movers = [elements[index] for index in random.permutation(len(elements))[:count]]
        return _moved(random, replace(scene, elements=tuple(elements)), movers)
    scene = replace(scene, elements=tuple(elements))
    for _ in range(_TRIES):
        grown = place_new(random, scene, names)
        if grown is not scene:
            return grown
    return scene


def _moved(random: np.random.Generator, scene: Scene, movers: list[Element]) -> Scene:
    for element in movers:
        # Its old place is not free while it is still there: it really moves.
        place = find_place(scene, element.widget, random)
        if place:
            others = tuple(other for other in scene.elements if other is not element)
            scene = replace(scene, elements=(*others, place))
    return scene
