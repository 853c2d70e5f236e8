# SPDX-License-Identifier: Apache-2.0
"""Lessons: screenshots, what they show, and questions about them, for each stage of training.

Lesson number i of a stage is always drawn from the same seed, so a run can be repeated and resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from packed import Layout
from screens import Screen, random_questions
from splits import draw_screen
from targets import Shown

from starkv.synthetic import questions as asked
from starkv.synthetic.episodes import random_episode
from starkv.synthetic.layout import random_scene
from starkv.synthetic.samples import Evidence
from starkv.synthetic.scene import Element, Scene, render
from starkv.synthetic.suite import generator
from starkv.synthetic.widgets import Box, Canvas, Name

QUESTIONS = 20
"""About one screen."""
TASK_QUESTIONS = 6
"""About one view of an episode, of each task."""
TASK_WEIGHTS = {"changed": 6.0, "earlier": 3.0}
"""Of the losses of answers and of the guided heads, where it is not one: a view has one thing that is new at
most, and little that is gone, and tasks that are asked so seldom were not learned."""
NEXT_WEIGHT = 4.0
"""Of the words of an instruction's answer that say what comes next, on top of it. They are read off the
question, not off a screen, and three of ten were wrong while everything else was right in nine of ten."""
CHANGING, CHANGING_TRIES = 0.8, 3
"""Share of the views that are drawn again, and how often, until there is one thing that is new."""
MOST_ELEMENTS = 20
"""Of an episode's first screen, or a few more."""
VISUAL_TOKENS = 1024
"""About so many are in a batch."""
Mix = tuple[tuple[float, Layout], ...]
"""Share of batches, and their layout."""
FIRST_LAYOUTS: Mix = (
    (0.14, Layout(1, 448, 448)),
    (0.06, Layout(1, 448, 560)),
    (0.06, Layout(1, 560, 448)),
    (0.08, Layout(2, 224, 224)),
    (0.10, Layout(3, 224, 224)),
    (0.04, Layout(5, 224, 224)),
    (0.10, Layout(3, 336, 336)),
    (0.10, Layout(2, 448, 448)),
    (0.16, Layout(3, 448, 448)),
    (0.08, Layout(4, 448, 448)),
    (0.08, Layout(5, 448, 448)),
)
"""Small frames teach to look back at a quarter of the price."""
LAST_LAYOUTS: Mix = (
    (0.10, Layout(1, 448, 448)),
    (0.06, Layout(1, 448, 560)),
    (0.06, Layout(1, 560, 448)),
    (0.12, Layout(2, 448, 448)),
    (0.26, Layout(3, 448, 448)),
    (0.20, Layout(4, 448, 448)),
    (0.20, Layout(5, 448, 448)),
)
"""What the suite asks about."""
MOST_SKIPPED = 9
"""Steps of an episode before what is in view: elements have moved, some have gone."""


@dataclass(frozen=True)
class Asked:
    """A question with its answer, and where one head should look while the answer is written."""

    task: str
    text: str
    answer: str
    box: Box
    """Where a click counts."""
    looks: tuple[tuple[Evidence, ...], ...]
    """One or two places; the second counts once the answer has said what is done."""
    named: tuple[Evidence, ...] = ()
    """What the question names, if that is not what the answer is about: another head should look there."""

    @property
    def weight(self) -> float:
        """Of its losses."""
        return TASK_WEIGHTS.get(self.task, 1.0)


@dataclass(frozen=True)
class Lesson:
    """Screenshots and questions about them."""

    layout: Layout
    frames: tuple[Canvas, ...]
    shown: tuple[tuple[Shown, ...], ...]
    """Elements of each frame."""
    questions: tuple[Asked, ...] = field(default=())


def screen_lesson(split: str, index: int, size: int, fewest: int, most: int, questions: int) -> Lesson:
    """One screen of a single window, each question about an element by its name."""
    screen, random = draw_screen(split, index, size, fewest, most)
    drawn = random_questions(random, screen, questions) if questions else []
    return Lesson(
        Layout(1, size, size),
        (screen.image,),
        (_shown_of_screen(screen),),
        tuple(
            Asked(
                "icon" if q.element.kind == "icon" else "word",
                q.text,
                q.answer,
                q.element.box,
                ((Evidence(0, q.element.box),),),
            )
            for q in drawn
        ),
    )


def _shown_of_screen(screen: Screen) -> tuple[Shown, ...]:
    return tuple(Shown(e.box, e.color, e.shape, e.word) for e in screen.elements)


def mixed_lessons(split: str, run: int, index: int, layouts: Mix = LAST_LAYOUTS) -> list[Lesson]:
    """A batch of the last stage: single screens or views of episodes, all of one layout.

    Args:
        split: of the suite.
        run: seed; another one draws other lessons.
        index: of the batch.
        layouts: which there are.
    """
    random = generator("click", split, run, 10_000_000 + index)
    weights = np.array([weight for weight, _ in layouts])
    layout = layouts[random.choice(len(layouts), p=weights / weights.sum())][1]
    count = max(1, VISUAL_TOKENS // layout.visual_tokens)
    make = scene_lesson if layout.frames == 1 else view_lesson
    return [make(random, layout) for _ in range(min(count, 6))]


def _crowd(random: np.random.Generator, layout: Layout) -> tuple[int, int]:
    rows, columns = layout.grid
    most = max(4, rows * columns // 8)
    if layout.frames > 1:
        most = min(most, MOST_ELEMENTS)
    fewest = int(random.integers(3, most))
    return fewest, min(most, fewest + 6)


def scene_lesson(random: np.random.Generator, layout: Layout) -> Lesson:
    """One screen with questions of all kinds."""
    scene, _ = random_scene(random, layout.height, layout.width, *_crowd(random, layout))
    relations = list(islice(asked.relation_questions(random, scene), QUESTIONS * 2 // 5))
    order = random.permutation(len(scene.elements))[: QUESTIONS - len(relations)]
    named = [asked.name_question(random, scene.elements[number]) for number in order]
    return _lesson(layout, (scene,), (None,), [*named, *relations])


def view_lesson(random: np.random.Generator, layout: Layout) -> Lesson:
    """Successive frames of an episode with questions of all tasks."""
    fewest, most = _crowd(random, layout)
    skipped = int(random.integers(0, MOST_SKIPPED + 1))
    end = skipped + layout.frames
    for _ in range(CHANGING_TRIES if random.random() < CHANGING else 1):
        episode = random_episode(random, end + 1, layout.height, layout.width, fewest, most)
        questions = {
            task: list(islice(some, TASK_QUESTIONS))
            for task, some in episode.questions(random, end, layout.frames).items()
        }
        if questions["changed"]:
            break
    # Few elements have moved; clicking the others teaches to find the last frame all the same.
    current, last = questions["current"], episode.scenes[end]
    others = (e for e in _shuffled(random, last.elements) if all(e != q.target for q in current))
    current += [
        replace(asked.name_question(random, element, layout.frames - 1), task="current")
        for element in islice(others, TASK_QUESTIONS - len(current))
    ]
    return _lesson(
        layout,
        episode.scenes[skipped + 1 :],
        (*episode.clicks[skipped + 1 : end], None),
        [question for some in questions.values() for question in some],
    )


def _shuffled(random: np.random.Generator, elements: Sequence[Element]) -> list[Element]:
    return [elements[index] for index in random.permutation(len(elements))]


def _lesson(
    layout: Layout,
    scenes: Sequence[Scene],
    clicks: Sequence[Name | None],
    questions: Sequence[asked.Question],
) -> Lesson:
    frames, shown = [], []
    for number, (scene, clicked) in enumerate(zip(scenes, clicks, strict=True)):
        element = scene.find(clicked) if clicked else None
        frames.append(render(scene, element.box if element else None))
        before = scenes[number - 1] if number else None
        shown.append(
            tuple(
                Shown(
                    e.box,
                    e.name.color,
                    e.name.shape,
                    e.name.word,
                    new=before is not None and before.find(e.name) is None,
                    clicked=e.name == clicked,
                )
                for e in scene.elements
            )
        )
    return Lesson(
        layout,
        tuple(frames),
        tuple(shown),
        tuple(
            Asked(
                q.task,
                q.text,
                q.answer,
                q.target.box,
                _looks(q),
                q.evidence[:1] if q.task == "relation" else (),
            )
            for q in questions
        ),
    )


def _looks(question: asked.Question) -> tuple[tuple[Evidence, ...], ...]:
    evidence = question.evidence
    if question.task == "instruction":
        return evidence[:1], evidence[1:]
    if question.task == "relation":
        return (evidence[1:],)
    if question.task == "changed":
        return (evidence[:1],)
    return (evidence,)
