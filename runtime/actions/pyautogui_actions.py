# SPDX-License-Identifier: Apache-2.0
"""From a call of PyAutoGUI, or of OpenCUA's own ``computer`` functions, to typed actions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starkv.runtime.actions.arguments import ArgumentError
from starkv.runtime.actions.types import (
    Action,
    CallUser,
    Click,
    DoubleClick,
    Finished,
    Hotkey,
    Hover,
    KeyDown,
    KeyUp,
    Point,
    Press,
    RightClick,
    Scroll,
    TripleClick,
    TypeText,
    Wait,
)

_MOST_PRESSES = 100

Literal = str | int | float | list[str]


@dataclass(frozen=True)
class Call:
    """One call with its literal arguments."""

    name: str
    positional: tuple[Literal, ...]
    named: dict[str, Literal]

    def take(self, *names: str) -> dict[str, Literal]:
        """Arguments by name; positional ones are in the order of ``names``.

        Raises:
            ArgumentError: an argument has another name, or there are too many.
        """
        if len(self.positional) > len(names):
            raise ArgumentError(f"{self.name} takes at most {len(names)} arguments")
        given = dict(zip(names, self.positional, strict=False))
        for name, value in self.named.items():
            if name not in names:
                raise ArgumentError(f"{self.name} takes no {name}")
            if name in given:
                raise ArgumentError(f"{self.name} is given {name} twice")
            given[name] = value
        return given


def _number(value: Literal | None, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ArgumentError(f"{what} is no number")
    return float(value)


def read_point(given: dict[str, Literal], name: str) -> Point:
    """The place that the arguments ``x`` and ``y`` of the call ``name`` give.

    Raises:
        ArgumentError: one is missing or no number.
    """
    return Point(*(_number(given.get(axis), f"{axis} of {name}") for axis in "xy"))


def _keys(value: Literal | None, name: str) -> list[str]:
    keys = [value] if isinstance(value, str) else value
    if not isinstance(keys, list) or not keys or not all(key.strip() for key in keys):
        raise ArgumentError(f"{name} needs a key")
    # A single character keeps its case: "A" is not "a".
    return [key.strip().lower() if len(key.strip()) > 1 else key.strip() for key in keys]


def _click(call: Call) -> Iterator[Action]:
    given = call.take("x", "y", "clicks", "interval", "button")
    point, button = read_point(given, call.name), given.get("button", "left")
    clicks = _number(given.get("clicks", 1), "clicks")
    kinds: dict[tuple[Literal, float], Callable[[Point], Action]] = {
        ("left", 1): Click,
        ("left", 2): DoubleClick,
        ("left", 3): TripleClick,
        ("right", 1): RightClick,
    }
    kind = kinds.get((button, clicks)) if isinstance(button, str) else None
    if kind is None:
        raise ArgumentError(f"there is no action for {clicks:g} clicks of the button {button!r}")
    yield kind(point)


def _at(kind: Callable[[Point], Action]) -> Callable[[Call], Iterator[Action]]:
    def build(call: Call) -> Iterator[Action]:
        yield kind(read_point(call.take("x", "y", "interval", "button", "duration"), call.name))

    return build


def _write(call: Call) -> Iterator[Action]:
    message = call.take("message", "interval").get("message")
    if not isinstance(message, str):
        raise ArgumentError(f"{call.name} needs a text")
    yield TypeText(message)


def _press(call: Call) -> Iterator[Action]:
    given = call.take("keys", "presses", "interval")
    presses = _number(given.get("presses", 1), "presses")
    if not 1 <= presses <= _MOST_PRESSES:
        raise ArgumentError(f"presses is {presses:g}, not 1 to {_MOST_PRESSES}")
    for _ in range(int(presses)):
        yield from map(Press, _keys(given.get("keys"), call.name))


def _hotkey(call: Call) -> Iterator[Action]:
    keys: list[str] = []
    for value in (*call.positional, *call.named.values()):
        keys += _keys(value, call.name)
    if not keys or set(call.named) - {"keys"}:
        raise ArgumentError("hotkey needs keys")
    yield Hotkey(tuple(keys))


def _one_key(kind: Callable[[str], Action]) -> Callable[[Call], Iterator[Action]]:
    def build(call: Call) -> Iterator[Action]:
        (key, *more) = _keys(call.take("key").get("key"), call.name)
        if more:
            raise ArgumentError(f"{call.name} takes one key")
        yield kind(key)

    return build


def _scroll(call: Call) -> Iterator[Action]:
    given = call.take("clicks", "x", "y")
    clicks = _number(given.get("clicks"), "clicks")
    point = read_point(given, call.name) if {"x", "y"} & set(given) else None
    if not clicks:
        raise ArgumentError("a scroll of nothing")
    if call.name == "pyautogui.hscroll":
        yield Scroll("right" if clicks > 0 else "left", point)
    else:
        yield Scroll("up" if clicks > 0 else "down", point)


def _terminate(call: Call) -> Iterator[Action]:
    status = call.take("status", "answer").get("status")
    if status not in ("success", "failure"):
        raise ArgumentError("terminate needs the status success or failure")
    yield Finished() if status == "success" else CallUser()


def _wait(call: Call) -> Iterator[Action]:
    yield Wait()


BUILDERS: dict[str, Callable[[Call], Iterator[Action]]] = {
    "pyautogui.click": _click,
    "pyautogui.leftClick": _at(Click),
    "pyautogui.doubleClick": _at(DoubleClick),
    "pyautogui.tripleClick": _at(TripleClick),
    "pyautogui.rightClick": _at(RightClick),
    "pyautogui.moveTo": _at(Hover),
    "pyautogui.write": _write,
    "pyautogui.typewrite": _write,
    "pyautogui.press": _press,
    "pyautogui.hotkey": _hotkey,
    "pyautogui.keyDown": _one_key(KeyDown),
    "pyautogui.keyUp": _one_key(KeyUp),
    "pyautogui.scroll": _scroll,
    "pyautogui.vscroll": _scroll,
    "pyautogui.hscroll": _scroll,
    "pyautogui.sleep": _wait,
    "time.sleep": _wait,
    "computer.wait": _wait,
    "computer.triple_click": _at(TripleClick),
    "computer.tripleClick": _at(TripleClick),
    "computer.terminate": _terminate,
}
"""Call → its actions; each raises ``ArgumentError`` where the arguments don't fit.

``dragTo`` depends on the call before it and is not here.
"""
