# SPDX-License-Identifier: Apache-2.0
"""From model coordinates to screen pixels, and the JSON form of actions, which carries both."""

import dataclasses
from typing import NamedTuple

from starkv.manifest import CoordinateConvention
from starkv.runtime.actions.types import (
    Action,
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    Hover,
    KeyDown,
    KeyUp,
    LongPress,
    OpenApp,
    Point,
    Press,
    PressBack,
    PressHome,
    RightClick,
    Scroll,
    Select,
    TripleClick,
    TypeText,
    Wait,
)

JsonValue = str | list[str] | list[float]

_TYPES: dict[type[Action], str] = {
    Click: "click",
    DoubleClick: "double_click",
    TripleClick: "triple_click",
    RightClick: "right_click",
    Hover: "hover",
    LongPress: "long_press",
    Drag: "drag",
    Select: "select",
    Hotkey: "hotkey",
    Press: "press",
    KeyDown: "key_down",
    KeyUp: "key_up",
    TypeText: "type",
    Scroll: "scroll",
    Wait: "wait",
    OpenApp: "open_app",
    PressHome: "press_home",
    PressBack: "press_back",
    Finished: "finished",
    CallUser: "call_user",
}
_PLACE_KEYS = {
    "point": ("model_xy", "screen_xy"),
    "start": ("model_xy", "screen_xy"),
    "end": ("model_end_xy", "screen_end_xy"),
}


class Size(NamedTuple):
    """Width and height of an image in pixels."""

    width: int
    height: int


class ScreenPoint(NamedTuple):
    """A place on the screen in pixels of the original image; fractions are kept."""

    x: float
    y: float


def to_screen(point: Point, resized: Size, original: Size, convention: CoordinateConvention) -> ScreenPoint:
    """Map a model's point to the screen.

    Args:
        point: as the model wrote it.
        resized: of the image that the model saw, after ``smart_resize``.
        original: of the screenshot.
        convention: whether the model counts pixels of ``resized`` or thousandths.

    Returns:
        A place within ``[0, width - 1] x [0, height - 1]``: a point past the edge, such as 1000 of 1000,
        lands on the last pixel, because a pointer can't be anywhere else.

    Raises:
        ValueError: a size is empty.
    """
    if min(*resized, *original) < 1:
        raise ValueError(f"sizes have to be positive: resized {resized}, original {original}")
    span = resized if convention == "absolute" else Size(1000, 1000)
    return ScreenPoint(
        _clamp(point.x / span.width * original.width, original.width),
        _clamp(point.y / span.height * original.height, original.height),
    )


def on_screen(action: Action, resized: Size, original: Size, convention: CoordinateConvention) -> Action:
    """The action with its places in screen pixels; sizes and convention are those of :func:`to_screen`."""
    places = {
        field.name: Point(*to_screen(value, resized, original, convention))
        for field in dataclasses.fields(action)
        if isinstance(value := getattr(action, field.name), Point)
    }
    return dataclasses.replace(action, **places)  # type: ignore[arg-type]


def to_json(
    action: Action, resized: Size, original: Size, convention: CoordinateConvention
) -> dict[str, JsonValue]:
    """An action as JSON values: ``{"type": "click", "model_xy": [x, y], "screen_xy": [x, y]}``.

    The end of a drag is ``model_end_xy`` and ``screen_end_xy``; other fields keep their names. Screen pixels
    are rounded to hundredths. The sizes and the convention are those of :func:`to_screen`.
    """
    values: dict[str, JsonValue] = {"type": _TYPES[type(action)]}
    for field in dataclasses.fields(action):
        value: object = getattr(action, field.name)
        if isinstance(value, Point):
            model_key, screen_key = _PLACE_KEYS[field.name]
            screen = to_screen(value, resized, original, convention)
            values[model_key] = [_short(value.x), _short(value.y)]
            values[screen_key] = [_short(round(screen.x, 2)), _short(round(screen.y, 2))]
        elif isinstance(value, tuple):
            values[field.name] = list(value)
        elif isinstance(value, str):
            values[field.name] = value
    return values


def _clamp(pixel: float, length: int) -> float:
    return min(max(pixel, 0.0), float(length - 1))


def _short(number: float) -> float:
    """An int where that loses nothing, so that JSON says 12 and not 12.0."""
    return int(number) if float(number).is_integer() else number
