# SPDX-License-Identifier: Apache-2.0
"""The suite: which questions belong to a split. Every screen and every episode has a seed of its own."""

from collections.abc import Iterator

import numpy as np

from starkv.errors import UsageError
from starkv.synthetic.episodes import FEWEST_FRAMES, MOST_FRAMES, Episode, random_episode
from starkv.synthetic.layout import random_scene
from starkv.synthetic.questions import (
    CLICK_TASKS,
    TRAJECTORY_TASKS,
    Question,
    name_question,
    relation_questions,
)
from starkv.synthetic.samples import Sample
from starkv.synthetic.scene import render
from starkv.synthetic.widgets import Canvas

SPLITS = ("train", "validation", "test")
SCREEN_SIZES = ((448, 448), (448, 560), (560, 448))
"""Height and width in pixels: 256 or 320 visual tokens."""
EPISODE_SIZE = (448, 448)
EPISODE_STEPS = 14
"""Scenes of an episode: with three in view from the first question on, twelve questions."""
SPARSE, DENSE = (6, 16), (16, 36)
"""Fewest and most elements of a screen."""
EPISODE_ELEMENTS = (6, 20)
_KINDS = {"click": 0, "trajectory": 1}


def generator(kind: str, split: str, seed: int, number: int) -> np.random.Generator:
    """Source of all randomness of one screen or episode; no two share one.

    Args:
        kind: ``click`` or ``trajectory``.
        split: one of ``SPLITS``.
        seed: of the suite, at least 0.
        number: of the screen or episode.

    Raises:
        UsageError: no such split, or a negative seed.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if seed < 0:
        raise UsageError(f"the seed must be at least 0, not {seed}")
    return np.random.default_rng([_KINDS[kind], SPLITS.index(split), seed, number])


def click_samples(split: str, seed: int, count: int) -> Iterator[Sample]:
    """``count`` questions about single screens, one of each of ``CLICK_TASKS`` per screen if it can be.

    Sparse and dense screens and their sizes take turns.
    """
    asked = number = 0
    while asked < count:
        random = generator("click", split, seed, number)
        height, width = SCREEN_SIZES[number % len(SCREEN_SIZES)]
        scene, _ = random_scene(random, height, width, *(SPARSE, DENSE)[number % 2])
        elements = [scene.elements[index] for index in random.permutation(len(scene.elements))]
        picked = [next((e for e in elements if e.name.is_icon == wanted), None) for wanted in (True, False)]
        questions = [name_question(random, element) for element in picked if element]
        questions += [question for question, _ in zip(relation_questions(random, scene), "1", strict=False)]
        frames = (render(scene),)
        for index, question in enumerate(questions[: count - asked]):
            yield _sample(f"click-{split}-{seed}-{number}-{index}", f"{number}", frames, question)
        asked += len(questions)
        number += 1


def trajectory_samples(split: str, seed: int, count: int) -> Iterator[Sample]:
    """``count`` questions along episodes: one per step, with three to five frames in view.

    Each step asks the task that was asked least so far in the episode among those that it allows.
    """
    asked = number = 0
    while asked < count:
        random = generator("trajectory", split, seed, number)
        episode = random_episode(random, EPISODE_STEPS, *EPISODE_SIZE, *EPISODE_ELEMENTS)
        in_view = int(random.integers(FEWEST_FRAMES, MOST_FRAMES + 1))
        tally = dict.fromkeys(TRAJECTORY_TASKS, 0)
        # Frames are drawn once, so that whoever encodes them can tell that they are the same.
        pointed: dict[int, Canvas] = {}
        for end in range(FEWEST_FRAMES - 1, EPISODE_STEPS):
            if asked == count:
                break
            frames_in_view = min(in_view, end + 1)
            question = _least_asked(random, episode, end, frames_in_view, tally)
            earlier = range(end - frames_in_view + 1, end)
            for step in earlier:
                if step not in pointed:
                    pointed[step] = episode.pointed(step)
            frames = (*(pointed[step] for step in earlier), render(episode.scenes[end]))
            yield _sample(f"trajectory-{split}-{seed}-{number}-{end}", f"{number}", frames, question)
            asked += 1
        number += 1


def _least_asked(
    random: np.random.Generator, episode: Episode, end: int, count: int, tally: dict[str, int]
) -> Question:
    possible = {task: next(some, None) for task, some in episode.questions(random, end, count).items()}
    found = {task: question for task, question in possible.items() if question}
    task = min(found, key=lambda name: (tally[name], TRAJECTORY_TASKS.index(name)))
    tally[task] += 1
    return found[task]


def _sample(id: str, group: str, frames: tuple[Canvas, ...], question: Question) -> Sample:
    target = question.target
    return Sample(
        id, question.task, group, frames, question.text, question.answer, target.box, question.evidence
    )


__all__ = ["CLICK_TASKS", "SPLITS", "TRAJECTORY_TASKS", "click_samples", "generator", "trajectory_samples"]
