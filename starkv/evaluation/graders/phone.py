# SPDX-License-Identifier: Apache-2.0
"""The rules of AndroidControl's steps.

``lenient-10%-or-72px`` follows the driver of STaR-KV's authors: a tap counts
within a tenth of the screen's width and height, or 72 pixels if that is more; a scroll also in the opposite
direction; a typed text also if it is part of the right one or the right one is part of it.

``strict-14%-or-box`` is nearer to the literature: a tap counts within 14 % of the screen, or in the box of
the element that was tapped; direction and normalised text have to be right. Both demand the type of the
action.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from starkv.evaluation.answers import Answer, Place, PlacedAction
from starkv.evaluation.boxes import Box
from starkv.evaluation.graders.text import contains, normalised
from starkv.runtime.actions.coordinates import Size
from starkv.runtime.actions.types import (
    CallUser,
    Click,
    Finished,
    LongPress,
    OpenApp,
    PressBack,
    PressHome,
    Scroll,
    TypeText,
    Wait,
)

LENIENT, STRICT = "lenient-10%-or-72px", "strict-14%-or-box"
LENIENT_POINT, STRICT_POINT = f"grounding-{LENIENT}", f"grounding-{STRICT}"
POINTING = ("click", "long_press")
"""Types of action with a place."""
NEAR_SHARE, NEAR_PIXELS, FAR_SHARE = 0.10, 72, 0.14
_AXES = {"up": "vertical", "down": "vertical", "left": "horizontal", "right": "horizontal"}


@dataclass(frozen=True)
class PhoneAction:
    """A step on a phone in AndroidControl's words."""

    type: str
    place: Place | None = None
    text: str = ""
    """What is typed, the direction of a scroll, the name of an application, or the status of the goal."""


def phone_action(placed: PlacedAction) -> PhoneAction:
    """What a model's action is called in AndroidControl; actions that it doesn't have keep names of ours."""
    match placed.action:
        case Click():
            return PhoneAction("click", placed.place)
        case LongPress():
            return PhoneAction("long_press", placed.place)
        case TypeText(content):
            return PhoneAction("type_text", text=content)
        case Scroll(direction):
            return PhoneAction("scroll", text=direction)
        case OpenApp(name):
            return PhoneAction("open_app", text=name)
        case PressBack():
            return PhoneAction("navigate_back")
        case PressHome():
            return PhoneAction("navigate_home")
        case Wait():
            return PhoneAction("wait")
        case Finished():
            return PhoneAction("status", text="successful")
        case CallUser():
            return PhoneAction("status", text="infeasible")
        case other:
            return PhoneAction(f"none of the data set's: {type(other).__name__}", placed.place)


def grade_step(answer: Answer, wanted: PhoneAction, elements: Sequence[Box]) -> dict[str, float]:
    """Both rules, and for steps with a place both rules of the place alone.

    Args:
        answer: of the model; its first action counts.
        wanted: the right step.
        elements: boxes of the screen's elements in pixels.
    """
    done = phone_action(answer.first) if answer.first else None
    same_type = done is not None and done.type == wanted.type
    lenient = strict = same_type
    grades = {}
    if wanted.place is not None:
        place = done.place if done else None
        near = place is not None and is_near(place, wanted.place, answer.screen)
        right = place is not None and is_on_element(place, wanted.place, answer.screen, elements)
        grades = {LENIENT_POINT: float(near), STRICT_POINT: float(right)}
        lenient, strict = same_type and near, same_type and right
    elif done is not None and same_type:
        lenient, strict = same_text(done, wanted)
    return {LENIENT: float(lenient), STRICT: float(strict), **grades}


def is_near(place: Place, wanted: Place, screen: Size) -> bool:
    """The lenient rule of places: within a tenth of each side, or 72 pixels if that is more."""
    across = abs(place.x - wanted.x) * screen.width <= max(NEAR_SHARE * screen.width, NEAR_PIXELS)
    down = abs(place.y - wanted.y) * screen.height <= max(NEAR_SHARE * screen.height, NEAR_PIXELS)
    return across and down


def is_on_element(place: Place, wanted: Place, screen: Size, elements: Sequence[Box]) -> bool:
    """The strict rule of places: at most 14 % away, in shares of both sides, or in the element's box.

    The element is the smallest one that holds the right place.
    """
    if math.dist(place, wanted) <= FAR_SHARE:
        return True
    target = wanted.x * screen.width, wanted.y * screen.height
    touched = min((box for box in elements if box.holds(*target)), key=lambda box: box.area, default=None)
    return touched is not None and touched.holds(place.x * screen.width, place.y * screen.height)


def same_text(done: PhoneAction, wanted: PhoneAction) -> tuple[bool, bool]:
    """Whether two steps of the same type without a place agree, by the lenient and by the strict rule."""
    strict = normalised(done.text) == normalised(wanted.text)
    if wanted.type == "scroll":
        return _AXES.get(done.text) == _AXES.get(wanted.text), strict
    if wanted.type in ("type_text", "open_app"):
        return contains(done.text, wanted.text), strict
    # A finished goal is told from one that can't be reached by the strict rule only.
    return True, strict
