# SPDX-License-Identifier: Apache-2.0
"""What a GUI model can ask for. Points are in model coordinates; ``coordinates`` maps them to the screen."""

from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down", "left", "right"]


@dataclass(frozen=True)
class Point:
    """A place in model coordinates: pixels of the resized image, or thousandths of its sides."""

    x: float
    y: float


@dataclass(frozen=True)
class Click:
    """Press and release the left button, or tap."""

    point: Point


@dataclass(frozen=True)
class DoubleClick:
    """Click twice with the left button."""

    point: Point


@dataclass(frozen=True)
class TripleClick:
    """Click three times with the left button, which marks a line or a paragraph."""

    point: Point


@dataclass(frozen=True)
class RightClick:
    """Click with the right button."""

    point: Point


@dataclass(frozen=True)
class Hover:
    """Move the pointer without pressing anything."""

    point: Point


@dataclass(frozen=True)
class LongPress:
    """Hold a finger on the screen."""

    point: Point


@dataclass(frozen=True)
class Drag:
    """Press at ``start``, move, release at ``end``."""

    start: Point
    end: Point


@dataclass(frozen=True)
class Select:
    """Mark what lies between ``start`` and ``end``, by the same movement as a drag."""

    start: Point
    end: Point


@dataclass(frozen=True)
class Hotkey:
    """Press several keys together, in this order."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Press:
    """Press and release one key."""

    key: str


@dataclass(frozen=True)
class KeyDown:
    """Press one key and hold it."""

    key: str


@dataclass(frozen=True)
class KeyUp:
    """Let go of one key."""

    key: str


@dataclass(frozen=True)
class TypeText:
    """Type text into what has the focus; a line feed at the end submits it."""

    content: str


@dataclass(frozen=True)
class Scroll:
    """Show more of what lies in ``direction``; at ``point``, or wherever the pointer is."""

    direction: Direction
    point: Point | None = None


@dataclass(frozen=True)
class Wait:
    """Do nothing for a while, then look again."""


@dataclass(frozen=True)
class OpenApp:
    """Start an application by its name."""

    name: str


@dataclass(frozen=True)
class PressHome:
    """Go to the home screen of a phone."""


@dataclass(frozen=True)
class PressBack:
    """Press the back button of a phone."""


@dataclass(frozen=True)
class Finished:
    """The task is done; ``content`` is the answer, if one was asked for."""

    content: str = ""


@dataclass(frozen=True)
class CallUser:
    """The task can't go on without the user."""

    content: str = ""


PointAction = Click | DoubleClick | TripleClick | RightClick | Hover | LongPress
DragAction = Drag | Select
KeyAction = Press | KeyDown | KeyUp
Action = (
    PointAction
    | DragAction
    | KeyAction
    | Hotkey
    | TypeText
    | Scroll
    | Wait
    | OpenApp
    | PressHome
    | PressBack
    | Finished
    | CallUser
)
