# SPDX-License-Identifier: Apache-2.0
"""The synthetic suite: what its screens promise, and that its answers are right."""

from collections import Counter
from itertools import combinations, islice, pairwise

import numpy as np
import pytest

from starkv.errors import UsageError
from starkv.runtime.actions.parser import parse_response
from starkv.runtime.actions.types import Click
from starkv.synthetic import questions
from starkv.synthetic.episodes import Episode, random_episode
from starkv.synthetic.layout import random_scene
from starkv.synthetic.relations import neighbour
from starkv.synthetic.samples import Sample
from starkv.synthetic.scene import Element, Scene, Window, render
from starkv.synthetic.suite import (
    CLICK_TASKS,
    EPISODE_STEPS,
    SPLITS,
    TRAJECTORY_TASKS,
    click_samples,
    trajectory_samples,
)
from starkv.synthetic.widgets import POINTER_COLOR, THEMES, Name, Widget


@pytest.fixture(scope="module")
def clicks() -> list[Sample]:
    return list(click_samples("test", 0, 120))


@pytest.fixture(scope="module")
def steps() -> list[Sample]:
    return list(trajectory_samples("test", 0, 96))


def scene_of(*places: tuple[int, int]) -> Scene:
    """Icons of 20 pixels at those places, all red, each of a shape of its own."""
    theme = THEMES[0]
    elements = tuple(
        Element(Widget("icon", Name(color=0, shape=number), icon_size=14), x, y, theme)
        for number, (x, y) in enumerate(places)
    )
    return Scene(448, 448, theme.desktop, (Window((0, 0, 448, 448), theme),), elements)


@pytest.mark.parametrize("size", [(224, 224), (448, 448), (448, 560), (560, 448)])
def test_elements_lie_inside_of_windows_and_apart(size: tuple[int, int]) -> None:
    counts = []
    for seed in range(40):
        scene, _ = random_scene(np.random.default_rng(seed), *size, 6, 30)
        counts.append(len(scene.elements))
        assert render(scene).shape == (*size, 3)
        assert len({element.name for element in scene.elements}) == len(scene.elements)
        for element in scene.elements:
            x0, y0, x1, y1 = element.box
            assert any(
                px0 <= x0 and py0 <= y0 and x1 <= px1 and y1 <= py1
                for px0, py0, px1, py1 in (window.panel for window in scene.windows)
            )
        for one, two in combinations(scene.elements, 2):
            ax0, ay0, ax1, ay1 = one.box
            bx0, by0, bx1, by1 = two.box
            assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0
    assert min(counts) < 12
    assert max(counts) >= (12 if size[0] == 224 else 24)


def test_every_kind_of_widget_theme_and_number_of_windows_occurs() -> None:
    kinds: Counter[str] = Counter()
    windows: Counter[int] = Counter()
    themes = set()
    for seed in range(60):
        scene, _ = random_scene(np.random.default_rng(seed), 448, 448, 10, 30)
        kinds.update(element.widget.kind for element in scene.elements)
        windows[len(scene.windows)] += 1
        themes |= {window.theme for window in scene.windows}
    assert set(kinds) == {"icon", "button", "check", "menu", "field"}
    assert set(windows) == {1, 2, 3}
    assert themes == set(THEMES)


def test_a_seed_draws_the_same_and_splits_share_nothing(clicks: list[Sample]) -> None:
    again = list(click_samples("test", 0, 120))
    for one, two in zip(clicks, again, strict=True):
        assert (one.id, one.question, one.answer, one.box) == (two.id, two.question, two.answer, two.box)
        np.testing.assert_array_equal(one.frames[0], two.frames[0])
    drawn = {}
    for split in SPLITS:
        for seed in (0, 1):
            for sample in click_samples(split, seed, 30):
                drawn.setdefault(sample.frames[0].tobytes(), set()).add((split, seed))
    assert all(len(owners) == 1 for owners in drawn.values())


@pytest.mark.parametrize("count", [1, 2, 7])
def test_as_many_samples_as_asked_for_and_a_shorter_run_is_the_beginning(count: int) -> None:
    for make in (click_samples, trajectory_samples):
        few = [sample.id for sample in make("validation", 3, count)]
        assert len(few) == count
        assert few == [sample.id for sample in islice(make("validation", 3, 9), count)]


def test_split_and_seed_are_checked() -> None:
    with pytest.raises(UsageError, match="unknown split 'dev'; known: train, validation, test"):
        next(click_samples("dev", 0, 1))
    with pytest.raises(UsageError, match="seed must be at least 0, not -1"):
        next(trajectory_samples("test", -1, 1))


def test_answers_click_into_the_box(clicks: list[Sample], steps: list[Sample]) -> None:
    for sample in (*clicks, *steps):
        parsed = parse_response(sample.answer)
        (action,) = parsed.actions
        assert isinstance(action, Click)
        assert sample.hit(action.point.x, action.point.y)
        assert sample.distance(action.point.x, action.point.y) <= 1
        height, width, _ = sample.frames[-1].shape
        assert 0 <= sample.box[0] < sample.box[2] <= width
        assert 0 <= sample.box[1] < sample.box[3] <= height
        assert bool(parsed.thought) == (sample.task == "instruction")


def test_tasks_are_balanced_and_screens_large(clicks: list[Sample], steps: list[Sample]) -> None:
    assert set(Counter(sample.task for sample in clicks)) == set(CLICK_TASKS)
    assert min(Counter(sample.task for sample in clicks).values()) >= 30
    tasks = Counter(sample.task for sample in steps)
    assert set(tasks) == set(TRAJECTORY_TASKS)
    assert min(tasks.values()) >= 15
    assert all(min(frame.shape[:2]) >= 448 for sample in (*clicks, *steps) for frame in sample.frames)
    assert {len(sample.frames) for sample in steps} == {3, 4, 5}
    by_episode = Counter(sample.group for sample in steps)
    assert set(by_episode.values()) == {EPISODE_STEPS - 2}
    assert {sample.frames[0].shape for sample in clicks} == {(448, 448, 3), (448, 560, 3), (560, 448, 3)}


def test_frames_of_successive_steps_are_the_same_arrays(steps: list[Sample]) -> None:
    for one, two in pairwise(steps):
        if one.group == two.group and len(one.frames) == len(two.frames):
            # All but the oldest; the last one got the pointer meanwhile.
            assert all(a is b for a, b in zip(one.frames[1:-1], two.frames[:-2], strict=True))
            assert not np.array_equal(one.frames[-1], two.frames[-2])


def _has_pointer(frame: np.ndarray) -> bool:
    return bool((frame == POINTER_COLOR).all(-1).any())


def test_the_pointer_shows_in_earlier_frames_only(steps: list[Sample]) -> None:
    for sample in steps:
        assert all(_has_pointer(frame) for frame in sample.frames[:-1])
        assert not _has_pointer(sample.frames[-1])


def test_neighbours_are_near_in_line_and_clear() -> None:
    scene = scene_of((100, 100), (140, 104), (100, 200), (300, 100), (104, 230))
    first = scene.elements[0]
    assert neighbour(scene, first, "right of") is scene.elements[1]
    assert neighbour(scene, scene.elements[1], "left of") is first
    assert neighbour(scene, first, "below") is scene.elements[2]
    assert neighbour(scene, scene.elements[2], "above") is first
    assert neighbour(scene, first, "above") is None
    # 160 pixels away: too far.
    assert neighbour(scene, scene.elements[3], "left of") is scene.elements[1]
    assert neighbour(scene_of((0, 50), (200, 50)), scene_of((0, 50)).elements[0], "right of") is None
    # Two equally near ones.
    twins = scene_of((100, 100), (150, 90), (155, 110))
    assert neighbour(twins, twins.elements[0], "right of") is None


def views(count: int) -> list[tuple[Episode, tuple[Scene, ...]]]:
    found = []
    for seed in range(count):
        episode = random_episode(np.random.default_rng(seed), 5, 448, 448, 8, 14)
        found.append((episode, episode.scenes[1:]))
    return found


def test_trajectory_questions_are_what_they_say() -> None:
    asked: Counter[str] = Counter()
    for seed, (episode, view) in enumerate(views(40)):
        random = np.random.default_rng(seed)
        for some in episode.questions(random, 4, 4).values():
            for question in islice(some, 4):
                asked[question.task] += 1
                name = question.target.name
                found = [scene.find(name) for scene in view]
                if question.task == "current":
                    assert found[-1] == question.target
                    assert any(seen and seen.box != question.target.box for seen in found[:-1])
                elif question.task == "earlier":
                    assert found[-1] is None
                    assert {seen.box for seen in found if seen} == {question.target.box}
                elif question.task == "changed":
                    assert found[-1] == question.target
                    assert found[-2] is None
                    fresh = {e.name for e in view[-1].elements} - {e.name for e in view[-2].elements}
                    assert fresh == {name}
                else:
                    listed = question.text.removeprefix("Do: ").removesuffix(".").split(", ")
                    clicked = str(episode.clicks[3])
                    assert listed[listed.index(clicked) + 1] == str(name)
                    assert len(set(listed)) == len(listed)
                    assert question.thought == f"{clicked} is done, next {name}"
                for frame, box in question.evidence:
                    assert any(element.box == box for element in view[frame].elements) or (
                        question.task == "changed" and frame == 2
                    )
    assert set(asked) == set(TRAJECTORY_TASKS)
    assert min(asked.values()) >= 15


def test_nothing_is_new_where_something_moved_or_two_appeared() -> None:
    random = np.random.default_rng(0)
    one, two = scene_of((100, 100)), scene_of((100, 100), (200, 200))
    assert questions.changed_question(random, (one, two)) is not None
    assert questions.changed_question(random, (two, two)) is None
    assert questions.changed_question(random, (one, scene_of((100, 100), (200, 200), (300, 300)))) is None
    assert questions.changed_question(random, (one, scene_of((50, 50), (200, 200)))) is None
