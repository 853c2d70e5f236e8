# SPDX-License-Identifier: Apache-2.0
"""The rules of the public benchmarks on their edges."""

import math

import pytest

from starkv.evaluation.answers import Answer, Place, PlacedAction
from starkv.evaluation.boxes import Box
from starkv.evaluation.graders import desktop, phone
from starkv.evaluation.graders.desktop import DesktopAction
from starkv.evaluation.graders.phone import PhoneAction
from starkv.evaluation.graders.point import point_in_box
from starkv.evaluation.graders.text import contains, edits, normalised, similarity
from starkv.runtime.actions.coordinates import Size
from starkv.runtime.actions.types import (
    Action,
    CallUser,
    Click,
    Drag,
    Finished,
    Hotkey,
    LongPress,
    OpenApp,
    Point,
    Press,
    PressBack,
    Scroll,
    TypeText,
    Wait,
)

SCREEN = Size(1000, 2000)
ANYWHERE = Point(0, 0)


def answer(*actions: Action, at: tuple[float, float] | None = None, end: Place | None = None) -> Answer:
    place = Place(*at) if at else None
    return Answer(tuple(PlacedAction(action, place, end) for action in actions), SCREEN)


def test_bounding_boxes_of_both_conventions() -> None:
    """The same numbers are different boxes in ScreenSpot-v2 and in ScreenSpot-Pro."""
    assert Box.from_xywh([10, 20, 30, 40]) == Box(10, 20, 40, 60)
    assert Box.from_xyxy([10, 20, 30, 40]) == Box(10, 20, 30, 40)


@pytest.mark.parametrize("values", [[10, 20, 10, 40], [10, 20, 30, 20], [30, 20, 10, 40]])
def test_boxes_without_area_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="is empty"):
        Box.from_xyxy(values)


@pytest.mark.parametrize(
    ("at", "grade"),
    [
        ((0.1, 0.1), 1),
        ((0.2, 0.2), 1),
        ((0.15, 0.15), 1),
        ((0.0999, 0.15), 0),
        ((0.15, 0.2001), 0),
        (None, 0),
    ],
)
def test_points_in_a_box_include_its_edges(at: tuple[float, float] | None, grade: int) -> None:
    assert point_in_box(answer(Click(ANYWHERE), at=at), Box(100, 200, 200, 400)) == grade


def test_no_action_and_places_off_the_screen_are_wrong() -> None:
    whole = Box(0, 0, 1000, 2000)
    assert point_in_box(answer(), whole) == 0
    assert point_in_box(answer(Click(ANYWHERE), at=(1.2, 0.5)), whole) == 0


def test_texts() -> None:
    assert normalised("  Hello\n WORLD ") == "hello world"
    assert contains("New York", "york")
    assert not contains("", "york")
    assert contains("", " ")
    assert [edits("kitten", "sitting"), edits("", "abc"), edits("abc", "abc")] == [3, 3, 0]
    assert (similarity("", ""), similarity("abcd", "abcx")) == (1, 0.75)


CENTRE = Place(0.5, 0.5)
ELEMENT = [Box(0, 0, 1000, 2000), Box(400, 900, 900, 1100)]


@pytest.mark.parametrize(
    ("place", "lenient", "strict"),
    [
        (CENTRE, 1, 1),
        # A tenth of the width is 100 pixels, of the height 200.
        (Place(0.6, 0.5), 1, 1),
        (Place(0.6, 0.6), 1, 0),
        (Place(0.601, 0.5), 0, 1),
        (Place(0.64, 0.5), 0, 1),
        # Far away, but in the element; the page around it is not the element.
        (Place(0.85, 0.5), 0, 1),
        (Place(0.5, 0.7), 0, 0),
    ],
)
def test_taps_on_a_phone(place: Place, lenient: int, strict: int) -> None:
    # 0.6, 0.6 is 14.1 % away, and outside the element's height.
    tap = Answer((PlacedAction(Click(ANYWHERE), place),), SCREEN)
    grades = phone.grade_step(tap, PhoneAction("click", CENTRE), ELEMENT)
    assert grades == {
        phone.LENIENT: lenient,
        phone.STRICT: strict,
        phone.LENIENT_POINT: lenient,
        phone.STRICT_POINT: strict,
    }


def test_72_pixels_count_on_small_screens() -> None:
    assert phone.is_near(Place(0.72, 0), Place(0, 0), Size(100, 100))
    assert not phone.is_near(Place(0.73, 0), Place(0, 0), Size(100, 100))


def test_the_place_is_graded_even_if_the_type_is_wrong() -> None:
    grades = phone.grade_step(answer(LongPress(ANYWHERE), at=CENTRE), PhoneAction("click", CENTRE), [])
    assert (grades[phone.LENIENT], grades[phone.LENIENT_POINT], grades[phone.STRICT_POINT]) == (0, 1, 1)


@pytest.mark.parametrize(
    ("action", "wanted", "lenient", "strict"),
    [
        (Scroll("down"), PhoneAction("scroll", text="down"), 1, 1),
        (Scroll("up"), PhoneAction("scroll", text="down"), 1, 0),
        (Scroll("left"), PhoneAction("scroll", text="down"), 0, 0),
        (TypeText("New York\n"), PhoneAction("type_text", text="new  york"), 1, 1),
        (TypeText("York"), PhoneAction("type_text", text="New York"), 1, 0),
        (TypeText("Paris"), PhoneAction("type_text", text="New York"), 0, 0),
        (TypeText(""), PhoneAction("type_text", text="New York"), 0, 0),
        (OpenApp("clock"), PhoneAction("open_app", text="Clock"), 1, 1),
        (PressBack(), PhoneAction("navigate_back"), 1, 1),
        (Wait(), PhoneAction("navigate_back"), 0, 0),
        (Wait(), PhoneAction("wait"), 1, 1),
        (Finished(), PhoneAction("status", text="successful"), 1, 1),
        (CallUser(), PhoneAction("status", text="successful"), 1, 0),
        (Hotkey(("ctrl", "c")), PhoneAction("wait"), 0, 0),
    ],
)
def test_other_steps_on_a_phone(action: Action, wanted: PhoneAction, lenient: int, strict: int) -> None:
    assert phone.grade_step(answer(action), wanted, []) == {phone.LENIENT: lenient, phone.STRICT: strict}


def test_a_reply_without_an_action_is_wrong_by_every_rule() -> None:
    assert set(phone.grade_step(answer(), PhoneAction("click", CENTRE), []).values()) == {0}
    assert set(phone.grade_step(answer(), PhoneAction("wait"), []).values()) == {0}
    assert set(desktop.grade_step(answer(), [[DesktopAction("wait")]]).values()) == {0}


def grades_of(given: Answer, *wanted: DesktopAction) -> tuple[float, float]:
    grades = desktop.grade_step(given, [wanted])
    return grades[desktop.LENIENT], grades[desktop.STRICT]


BOXED = DesktopAction("click", Place(0.5, 0.5), boxes=(Box(0.4, 0.4, 0.6, 0.6),))
BARE = DesktopAction("click", Place(0.5, 0.5))


@pytest.mark.parametrize(
    ("x", "wanted", "lenient", "strict"),
    [
        (0.6, BOXED, 1, 1),
        (0.61, BOXED, math.exp(-120 * (0.11 - 0.01 * 2**0.5)), 0),
        (0.5 + 0.014, BARE, 1, 1),
        (0.52, BARE, math.exp(-120 * (0.02 - 0.01 * 2**0.5)), 0),
    ],
)
def test_clicks_on_a_desktop(x: float, wanted: DesktopAction, lenient: float, strict: float) -> None:
    grades = grades_of(answer(Click(ANYWHERE), at=(x, 0.5)), wanted)
    assert grades == (pytest.approx(lenient), strict)


@pytest.mark.parametrize(
    ("action", "wanted", "lenient", "strict"),
    [
        (Scroll("up"), DesktopAction("scroll", text="down"), 1, 0),
        (Scroll("up"), DesktopAction("scroll"), 1, 1),
        (Hotkey(("c", "ctrl")), DesktopAction("keys", keys=("ctrl", "c")), 1, 0),
        (Hotkey(("Ctrl", "c")), DesktopAction("keys", keys=("ctrl", "c")), 1, 1),
        (Press("enter"), DesktopAction("keys", keys=("enter",)), 1, 1),
        (TypeText("Hello wor"), DesktopAction("write", text="hello world"), 1, 1),
        (TypeText("hell"), DesktopAction("write", text="hello world"), 4 / 11 / 0.8, 0),
        (Finished(), DesktopAction("terminate", text="success"), 1, 1),
        (CallUser(), DesktopAction("terminate", text="success"), 0, 0),
        (Wait(), BARE, 0, 0),
    ],
)
def test_other_steps_on_a_desktop(
    action: Action, wanted: DesktopAction, lenient: float, strict: float
) -> None:
    assert grades_of(answer(action), wanted) == (pytest.approx(lenient), strict)


def test_writing_and_submitting_are_one_action() -> None:
    wanted = DesktopAction("write", text="hello"), DesktopAction("keys", keys=("enter",))
    assert grades_of(answer(TypeText("hello\n")), *wanted) == (1, 1)
    assert grades_of(answer(TypeText("hello"), Press("enter")), *wanted) == (1, 1)


def test_moving_and_clicking_there_are_one_action() -> None:
    move, away = DesktopAction("moveto", BOXED.place, boxes=BOXED.boxes), DesktopAction("moveto", Place(0, 0))
    assert grades_of(answer(Click(ANYWHERE), at=(0.6, 0.6)), move, BARE) == (1, 1)
    assert grades_of(answer(Click(ANYWHERE), at=(0.5, 0.5)), away, BARE) == (0, 0)


def test_a_drag_is_a_movement_and_a_drag() -> None:
    start, end = Place(0.2, 0.2), Place(0.8, 0.8)
    given = answer(Drag(ANYWHERE, ANYWHERE), at=start, end=end)
    right = DesktopAction("moveto", start), DesktopAction("dragto", end)
    assert grades_of(given, *right) == (1, 1)
    assert grades_of(given, right[0], DesktopAction("dragto", start)) == (1, 0.5)


def test_missing_and_extra_actions_cost_by_the_strict_rule_only() -> None:
    wait, save = DesktopAction("wait"), DesktopAction("keys", keys=("ctrl", "s"))
    assert grades_of(answer(Wait()), wait, save) == (1, 0.5)
    assert grades_of(answer(Wait(), Wait(), Wait()), wait) == (1, pytest.approx(1 / 3))


def test_the_nearest_of_several_ways_counts() -> None:
    options = [[DesktopAction("wait")], [DesktopAction("scroll", text="down")]]
    assert set(desktop.grade_step(answer(Scroll("down")), options).values()) == {1}
