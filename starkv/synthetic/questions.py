# SPDX-License-Identifier: Apache-2.0
"""Questions about screens, and their right answers.

The answer is the click. Only an instruction's says first what is done and what comes next, as GUI agents do
in their thoughts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from starkv.synthetic.relations import RELATIONS, neighbour
from starkv.synthetic.samples import Evidence
from starkv.synthetic.scene import Element, Scene
from starkv.synthetic.widgets import Name

VERBS = ("Click", "Click on", "Press", "Tap")
CLICK_TASKS = ("icon", "word", "relation")
TRAJECTORY_TASKS = ("current", "earlier", "changed", "instruction")
FEWEST_STEPS, MOST_STEPS = 3, 4
"""Steps of an instruction."""


@dataclass(frozen=True)
class Question:
    """A request about one or more screens, the last of them the current one."""

    task: str
    text: str
    thought: str
    """What the answer says before the click; empty if there is nothing to work out in words."""
    target: Element
    evidence: tuple[Evidence, ...]
    """What the answer is about, in the order in which it is needed."""

    @property
    def answer(self) -> str:
        x, y = self.target.center
        click = f"Action: click(start_box='({x},{y})')"
        return f"Thought: {self.thought}.\n{click}" if self.thought else click


def _verb(random: np.random.Generator) -> str:
    return VERBS[random.integers(len(VERBS))]


def name_question(random: np.random.Generator, element: Element, frame: int = 0) -> Question:
    """An element by its name: "Click 'Save'."

    Args:
        random: picks the verb.
        element: to be clicked.
        frame: number of the current frame.
    """
    task = "icon" if element.name.is_icon else "word"
    text = f"{_verb(random)} {element.name}."
    return Question(task, text, "", element, (Evidence(frame, element.box),))


def relation_questions(random: np.random.Generator, scene: Scene) -> Iterator[Question]:
    """Clear neighbours of other elements, in random order: "Click what is right of 'Save'." """
    pairs = [(element, relation) for element in scene.elements for relation in RELATIONS]
    for index in random.permutation(len(pairs)):
        reference, relation = pairs[index]
        target = neighbour(scene, reference, relation)
        if target:
            yield Question(
                "relation",
                f"{_verb(random)} what is {relation} {reference.name}.",
                "",
                target,
                (Evidence(0, reference.box), Evidence(0, target.box)),
            )


def current_questions(random: np.random.Generator, view: Sequence[Scene]) -> Iterator[Question]:
    """What an earlier frame shows elsewhere, so that stale screens have to be ignored: "Click 'Save'." """
    last = len(view) - 1
    for element in _shuffled(random, view[-1].elements):
        before = [scene.find(element.name) for scene in view[:-1]]
        if any(seen and seen.box != element.box for seen in before):
            yield Question(
                "current", f"{_verb(random)} {element.name}.", "", element, (Evidence(last, element.box),)
            )


def earlier_questions(random: np.random.Generator, view: Sequence[Scene]) -> Iterator[Question]:
    """What is gone, and was always at the same place: "Click where 'Save' was." """
    gone = {element.name: element for scene in view[:-1] for element in scene.elements}
    gone = {name: element for name, element in gone.items() if view[-1].find(name) is None}
    for element in _shuffled(random, tuple(gone.values())):
        seen = [(frame, scene.find(element.name)) for frame, scene in enumerate(view)]
        if all(other is None or other.box == element.box for _, other in seen):
            yield Question(
                "earlier",
                f"{_verb(random)} where {element.name} was.",
                "",
                element,
                tuple(Evidence(frame, element.box) for frame, other in seen if other),
            )


def changed_question(random: np.random.Generator, view: Sequence[Scene]) -> Question | None:
    """The one element that the frame before did not show: "Click what is new."

    None unless exactly one is new and nothing moved.
    """
    last = len(view) - 1
    new = [element for element in view[-1].elements if view[-2].find(element.name) is None]
    moved = [
        element
        for element in view[-1].elements
        if (before := view[-2].find(element.name)) and before.box != element.box
    ]
    if len(new) != 1 or moved:
        return None
    target = new[0]
    evidence = (Evidence(last, target.box), Evidence(last - 1, target.box))
    return Question("changed", f"{_verb(random)} what is new.", "", target, evidence)


def instruction_question(
    random: np.random.Generator, view: Sequence[Scene], clicked: Name, following: Element
) -> Question:
    """The step after the one that the pointer shows in the frame before: "Do: 'Open', 'Save', the red star."

    Args:
        random: picks the other steps.
        view: frames; in the last but one the pointer is at ``clicked``.
        clicked: what was clicked there.
        following: the next step, on the last frame.
    """
    others = [e.name for e in view[-1].elements if e.name not in (clicked, following.name)]
    count = min(int(random.integers(FEWEST_STEPS, MOST_STEPS + 1)) - 2, len(others))
    extra = [others[index] for index in random.permutation(len(others))[:count]]
    place = int(random.integers(0, len(extra) + 1))
    steps = [*extra[:place], clicked, following.name, *extra[place:]]
    before = view[-2].find(clicked)
    assert before is not None
    return Question(
        "instruction",
        f"Do: {', '.join(str(step) for step in steps)}.",
        f"{clicked} is done, next {following.name}",
        following,
        (Evidence(len(view) - 2, before.box), Evidence(len(view) - 1, following.box)),
    )


def _shuffled(random: np.random.Generator, elements: Sequence[Element]) -> list[Element]:
    return [elements[index] for index in random.permutation(len(elements))]
