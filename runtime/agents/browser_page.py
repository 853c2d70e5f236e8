# SPDX-License-Identifier: Apache-2.0
"""Actions on a browser's page, through the part of Playwright's interface that they need."""

from typing import Literal, Protocol

from starkv.runtime.actions.types import (
    Action,
    Click,
    DoubleClick,
    Drag,
    Hotkey,
    Hover,
    KeyDown,
    KeyUp,
    LongPress,
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
from starkv.runtime.agents.browser_keys import playwright_combination, playwright_key
from starkv.runtime.agents.environment import UnsupportedActionError

WAIT_MS = 5000
"""What UI-TARS's prompt says that ``wait()`` does."""
LONG_PRESS_MS = 800
SCROLLED = 0.5
"""Share of the page's height or width that one scroll moves."""
_DRAG_MOVES = 10
"""Movements on the way of a drag: pages that follow the pointer need to see some."""
_WHEEL = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}

Button = Literal["left", "middle", "right"]


class Mouse(Protocol):
    """Playwright's mouse; places in CSS pixels."""

    def move(self, x: float, y: float, *, steps: int | None = None) -> None: ...
    def click(
        self,
        x: float,
        y: float,
        *,
        button: Button | None = None,
        click_count: int | None = None,
        delay: float | None = None,
    ) -> None: ...
    def down(self) -> None: ...
    def up(self) -> None: ...
    def wheel(self, delta_x: float, delta_y: float) -> None: ...


class Keyboard(Protocol):
    """Playwright's keyboard."""

    def insert_text(self, text: str) -> None: ...
    def press(self, key: str) -> None: ...
    def down(self, key: str) -> None: ...
    def up(self, key: str) -> None: ...


class Page(Protocol):
    """Playwright's page."""

    @property
    def mouse(self) -> Mouse: ...
    @property
    def keyboard(self) -> Keyboard: ...
    def screenshot(self) -> bytes: ...
    def goto(self, url: str) -> object: ...
    def go_back(self) -> object: ...
    def wait_for_timeout(self, timeout: float) -> None: ...


def perform_on(page: Page, action: Action, viewport: tuple[int, int], home: str) -> None:
    """Carry out an action.

    Args:
        page: the page.
        action: with its places in CSS pixels of the viewport.
        viewport: width and height in CSS pixels.
        home: the address that the home button leads to.

    Raises:
        UnsupportedActionError: no browser can do this.
    """
    mouse, keyboard = page.mouse, page.keyboard
    match action:
        case Click(point):
            mouse.click(point.x, point.y)
        case DoubleClick(point):
            mouse.click(point.x, point.y, click_count=2)
        case TripleClick(point):
            mouse.click(point.x, point.y, click_count=3)
        case RightClick(point):
            mouse.click(point.x, point.y, button="right")
        case LongPress(point):
            mouse.click(point.x, point.y, delay=LONG_PRESS_MS)
        case Hover(point):
            mouse.move(point.x, point.y)
        case Drag(start, end) | Select(start, end):
            _drag(mouse, start, end)
        case Scroll(direction, point):
            if point:
                mouse.move(point.x, point.y)
            right, down = _WHEEL[direction]
            mouse.wheel(right * SCROLLED * viewport[0], down * SCROLLED * viewport[1])
        case TypeText(content):
            # The line feed at the end submits; those within the text belong to it.
            text = content.removesuffix("\n")
            if text:
                keyboard.insert_text(text)
            if text != content:
                keyboard.press("Enter")
        case Press(key):
            keyboard.press(playwright_key(key))
        case Hotkey(keys):
            keyboard.press(playwright_combination(keys))
        case KeyDown(key):
            keyboard.down(playwright_key(key))
        case KeyUp(key):
            keyboard.up(playwright_key(key))
        case Wait():
            page.wait_for_timeout(WAIT_MS)
        case PressBack():
            page.go_back()
        case PressHome():
            page.goto(home)
        case _:
            raise UnsupportedActionError(f"a browser can't do {type(action).__name__}")


def _drag(mouse: Mouse, start: Point, end: Point) -> None:
    mouse.move(start.x, start.y)
    mouse.down()
    mouse.move(end.x, end.y, steps=_DRAG_MOVES)
    mouse.up()
