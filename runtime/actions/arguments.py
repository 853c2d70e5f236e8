# SPDX-License-Identifier: Apache-2.0
"""From the name and the raw arguments of a call to a typed action."""

import re
from collections.abc import Callable, Mapping
from typing import get_args

from starkv.runtime.actions.types import (
    Action,
    CallUser,
    Click,
    Direction,
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
    TypeText,
    Wait,
)

Arguments = Mapping[str, str]

# Every dialect's name of an argument → ours.
ARGUMENT_NAMES: Mapping[str, str] = {
    "start_box": "start",
    "start_point": "start",
    "point": "start",
    "end_box": "end",
    "end_point": "end",
    "key": "key",
    "hotkey": "key",
    "press": "key",
    "content": "content",
    "direction": "direction",
    "app_name": "app_name",
}

_NUMBER = r"[+-]?[0-9]{1,9}(?:\.[0-9]{0,20})?"
_COMMA = r"(?:\s*,\s*|\s+)"
_NUMBERS = rf"{_NUMBER}{_COMMA}{_NUMBER}(?:{_COMMA}{_NUMBER}{_COMMA}{_NUMBER})?"
_PAIR = rf"\(\s*{_NUMBER}{_COMMA}{_NUMBER}\s*\)"
# The tags are optional: they are special tokens in some models and vanish when the reply is decoded.
_PLACE = re.compile(
    r"(?:<\|box_start\|>|<point>|<bbox>)?\s*"
    rf"(?:\(\s*{_NUMBERS}\s*\)|\[\s*{_NUMBERS}\s*\]|{_PAIR}\s*,?\s*{_PAIR}|{_NUMBERS})"
    r"\s*(?:<\|box_end\|>|</point>|</bbox>)?"
)
# What browsers call the arrow keys, next to what everything else calls them.
_KEY_NAMES = {"arrowleft": "left", "arrowright": "right", "arrowup": "up", "arrowdown": "down"}
_DIRECTIONS: dict[str, Direction] = {direction: direction for direction in get_args(Direction)}


class ArgumentError(ValueError):
    """An argument is missing, unexpected or has no meaning; the message is the reason."""


def build_action(name: str, arguments: Arguments) -> Action:
    """Make an action from a call.

    Args:
        name: of the call, in any dialect.
        arguments: unescaped values under our names.

    Raises:
        ArgumentError: the call is unknown or its arguments don't fit it.
    """
    known = _ACTIONS.get(name.lower())
    if known is None:
        raise ArgumentError(f"unknown action {name!r}")
    accepted, build = known
    for argument in arguments:
        if argument not in accepted:
            raise ArgumentError(f"{name} takes no {argument}")
    return build(arguments)


def parse_point(value: str) -> Point:
    """Read a point, or the centre of a box, in any notation.

    Raises:
        ArgumentError: it is neither two nor four numbers.
    """
    # Stray quotes: one official prompt shows the model a doubled closing quote.
    value = value.strip().strip("'\"").strip()
    if not _PLACE.fullmatch(value):
        raise ArgumentError(f"{_shortened(value)} is no point or box")
    numbers = [float(number) for number in re.findall(_NUMBER, value)]
    if len(numbers) == 4:
        return Point((numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2)
    return Point(numbers[0], numbers[1])


def _start(arguments: Arguments) -> Point:
    return parse_point(_required(arguments, "start"))


def _end(arguments: Arguments) -> Point:
    return parse_point(_required(arguments, "end"))


def _key(arguments: Arguments) -> str:
    return _key_name(_required(arguments, "key").strip())


def _hotkey(arguments: Arguments) -> Action:
    # "ctrl c" by the prompt, "ctrl+c" by habit; a plus at the end of a part is the key itself.
    parts = _required(arguments, "key").split()
    keys = [key for part in parts for key in re.split(r"(?<=[^+])\+(?=.)", part)]
    return Hotkey(tuple(_key_name(key) for key in keys))


def _key_name(key: str) -> str:
    # A single character keeps its case: "A" is not "a".
    lowered = key.lower() if len(key) > 1 else key
    return _KEY_NAMES.get(lowered, lowered)


def _scroll(arguments: Arguments) -> Action:
    wanted = _required(arguments, "direction").strip().lower()
    direction = _DIRECTIONS.get(wanted)
    if direction is None:
        raise ArgumentError(f"direction {_shortened(wanted)} is none of {', '.join(_DIRECTIONS)}")
    at = arguments.get("start", "")
    return Scroll(direction, parse_point(at) if at.strip() else None)


def _type(arguments: Arguments) -> Action:
    if "content" not in arguments:
        raise ArgumentError("type needs a content")
    return TypeText(arguments["content"])


def _required(arguments: Arguments, name: str) -> str:
    value = arguments.get(name, "")
    if not value.strip():
        raise ArgumentError(f"{name} is missing")
    return value


def _shortened(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:39] + "…")


_Builder = Callable[[Arguments], Action]


def _action_table() -> dict[str, tuple[frozenset[str], _Builder]]:
    """Name in any dialect → accepted arguments and builder."""
    table: dict[str, tuple[frozenset[str], _Builder]] = {}

    def add(names: str, accepted: str, build: _Builder) -> None:
        table.update(dict.fromkeys(names.split(), (frozenset(accepted.split()), build)))

    add("click left_single", "start", lambda a: Click(_start(a)))
    add("left_double", "start", lambda a: DoubleClick(_start(a)))
    add("right_single", "start", lambda a: RightClick(_start(a)))
    add("hover", "start", lambda a: Hover(_start(a)))
    add("long_press", "start", lambda a: LongPress(_start(a)))
    add("drag", "start end", lambda a: Drag(_start(a), _end(a)))
    add("select", "start end", lambda a: Select(_start(a), _end(a)))
    add("hotkey", "key", _hotkey)
    add("press", "key", lambda a: Press(_key(a)))
    add("keydown", "key", lambda a: KeyDown(_key(a)))
    add("keyup release", "key", lambda a: KeyUp(_key(a)))
    add("type", "content", _type)
    add("scroll", "start direction", _scroll)
    add("wait", "", lambda a: Wait())
    add("open_app", "app_name", lambda a: OpenApp(_required(a, "app_name").strip()))
    add("press_home", "", lambda a: PressHome())
    add("press_back", "", lambda a: PressBack())
    add("finished", "content", lambda a: Finished(a.get("content", "")))
    add("call_user", "content", lambda a: CallUser(a.get("content", "")))
    return table


_ACTIONS = _action_table()
ACTION_NAMES = frozenset(_ACTIONS)
