# SPDX-License-Identifier: Apache-2.0
"""The drawn desktop answers to clicks and keys, and judges its goal."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from starkv.errors import UsageError
from starkv.runtime.actions.types import (
    Action,
    Click,
    DoubleClick,
    Drag,
    Hotkey,
    OpenApp,
    Point,
    Press,
    RightClick,
    Scroll,
    TypeText,
    Wait,
)
from starkv.runtime.agents.desktop import DesktopEnvironment
from starkv.runtime.agents.environment import EnvironmentOptions, UnsupportedActionError, open_environment
from starkv.synthetic.desktop import Desktop, random_desktop
from starkv.synthetic.desktop_drawing import draw_desktop
from starkv.synthetic.desktop_goals import Goal, random_goal
from starkv.synthetic.scene import Element
from starkv.synthetic.widgets import POINTER_COLOR, Name

SEEDS = range(12)
MANY_SEEDS = range(40)


def desktop(seed: int) -> DesktopEnvironment:
    return DesktopEnvironment(EnvironmentOptions(seed=seed))


def middle(element: Element) -> Point:
    return Point(*map(float, element.center))


def step_of_oracle(environment: DesktopEnvironment) -> Action:
    """Click what the goal names next."""
    assert environment.judged.next_step
    element = environment.desktop.find(environment.judged.next_step)
    assert element, "the next step is not on the screen"
    return Click(middle(element))


def first(wanted: Callable[[Desktop, Element], bool]) -> tuple[Desktop, Element]:
    """A desktop with an element of that sort."""
    for seed in MANY_SEEDS:
        state = random_desktop(seed, 448, 448, 8, 18)
        for element in state.scene.elements:
            if wanted(state, element):
                return state, element
    raise AssertionError("no desktop has such an element")


@pytest.mark.parametrize("seed", SEEDS)
def test_an_oracle_reaches_the_goal_and_sees_every_click(seed: int) -> None:
    environment = desktop(seed)
    while not environment.done():
        assert not environment.succeeded()
        before = np.asarray(environment.screenshot())
        environment.perform(step_of_oracle(environment))
        assert (np.asarray(environment.screenshot()) != before).any()
    assert environment.succeeded()
    assert len(environment.judged.steps) == 4


def test_goals_lead_through_everything_that_a_click_can_do() -> None:
    kinds, opened = set(), set()
    for seed in MANY_SEEDS:
        environment = desktop(seed)
        while not environment.done():
            action = step_of_oracle(environment)
            assert isinstance(action, Click)
            element = environment.desktop.at(action.point.x, action.point.y)
            assert element
            kinds.add(element.widget.kind)
            environment.perform(action)
            popup = environment.desktop.popup
            opened.add(None if popup is None else popup.close_button is None)
    assert kinds == {"icon", "button", "check", "menu", "field"}
    assert opened == {None, True, False}, "nothing, a list and a window"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_click_misses_the_goal_for_good(seed: int) -> None:
    environment = desktop(seed)
    environment.perform(step_of_oracle(environment))
    allowed = environment.judged.steps[:2]
    wrong = next((e for e in environment.desktop.clickable if e.name not in allowed), None)
    assert wrong
    environment.perform(Click(middle(wrong)))
    assert (environment.done(), environment.succeeded()) == (True, False)


def test_the_right_elements_in_the_wrong_order_are_wrong() -> None:
    first_name, second = Name(word=1), Name(word=2)
    goal = Goal((first_name, second))
    assert goal.after(second).missed
    assert not goal.after(second).after(first_name).after(second).fulfilled
    assert goal.after(first_name).after(second).fulfilled


def test_the_step_before_may_be_clicked_again_and_is_no_progress() -> None:
    goal = Goal((Name(word=1), Name(word=2))).after(Name(word=1))
    assert goal.after(Name(word=1)) == goal


@pytest.mark.parametrize("kind", ["menu", "button"])
def test_what_was_closed_can_be_opened_again(kind: str) -> None:
    state, opener = first(lambda state, e: e.name in state.contents and e.widget.kind == kind)
    opened, _ = state.press(*opener.center)
    assert opened.popup
    x0, y0, x1, y1 = opened.popup.close_button or (0, 0, 1, 1)
    closed, press = opened.press((x0 + x1) / 2, (y0 + y1) / 2)
    assert (press.what, closed.popup) == ("close", None)
    assert closed.press(*opener.center)[0] == opened
    assert opened.key("esc") == closed


def test_a_window_keeps_clicks_from_what_lies_below() -> None:
    state, opener = first(lambda state, e: e.name in state.contents and e.widget.kind == "button")
    opened, _ = state.press(*opener.center)
    after, press = opened.press(*opener.center)
    assert (after, press.what) == (opened, "nothing")


def test_entries_close_their_list() -> None:
    state, menu = first(lambda state, e: e.name in state.contents and e.widget.kind == "menu")
    opened, _ = state.press(*menu.center)
    entry = opened.clickable[-1]
    assert entry.name not in {element.name for element in state.scene.elements}
    after, press = opened.press(*entry.center)
    assert (press.name, after.popup) == (entry.name, None)


def test_check_boxes_toggle() -> None:
    state, box = first(lambda _, e: e.widget.kind == "check")
    once, _ = state.press(*box.center)
    toggled = once.find(box.name)
    assert toggled
    assert toggled.widget.decorated != box.widget.decorated
    assert once.press(*box.center)[0] == state


def test_fields_take_what_is_typed_while_they_have_the_focus() -> None:
    state, field = first(lambda _, e: e.widget.kind == "field")
    assert state.type("lost") == state
    focused, _ = state.press(*field.center)
    typed = focused.type("hello").key("backspace")
    assert typed.typed[field.name] == "hell"
    looks = [
        draw_desktop(one) for one in (state, focused, typed, typed.type("日本\U0001f600"), typed.type("\n"))
    ]
    assert all((a != b).any() for a, b in itertools.pairwise(looks))
    x0, y0, x1, y1 = field.box
    for look in looks:
        changed = np.argwhere((look != looks[0]).any(axis=2))
        assert all(y0 <= y < y1 and x0 <= x < x1 for y, x in changed), "text stays in its field"
    assert typed.type("\n").focus is None
    assert draw_desktop(typed.type("x" * 500)).shape == looks[0].shape


def test_other_actions_change_nothing_or_are_refused() -> None:
    environment = desktop(3)
    before, place = environment.desktop, Point(200, 200)
    for action in (Wait(), Scroll("down"), RightClick(place), Drag(place, place), Hotkey(("ctrl", "s"))):
        environment.perform(action)
    environment.perform(Press("enter"))
    assert environment.desktop == before
    with pytest.raises(UnsupportedActionError, match="no OpenApp"):
        environment.perform(OpenApp("mail"))


def test_a_double_click_is_one_click() -> None:
    environment = desktop(0)
    action = step_of_oracle(environment)
    assert isinstance(action, Click)
    environment.perform(DoubleClick(action.point))
    assert environment.judged.reached == 1


def test_earlier_screens_show_what_was_clicked() -> None:
    environment = desktop(0)
    action = step_of_oracle(environment)
    marked = environment.acted_on(environment.screenshot(), action)
    assert marked
    assert (np.asarray(marked) == POINTER_COLOR).all(axis=2).any()
    assert environment.acted_on(environment.screenshot(), TypeText("x")) is None


def test_the_seed_says_all() -> None:
    assert desktop(5).goal == desktop(5).goal
    assert (np.asarray(desktop(5).screenshot()) == np.asarray(desktop(5).screenshot())).all()
    assert len({desktop(seed).goal for seed in range(10)}) == 10
    state = random_desktop(7, 448, 448, 8, 18)
    assert random_goal(state, 3).steps == random_goal(state, 4).steps[:3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (EnvironmentOptions(goal="Play."), "leave --goal out"),
        (EnvironmentOptions(url="https://a"), "leave --url out"),
        (EnvironmentOptions(seed=-1), "at least 0, not -1"),
    ],
)
def test_what_a_desktop_cannot_be(options: EnvironmentOptions, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_environment("desktop", options)
