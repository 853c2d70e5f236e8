# SPDX-License-Identifier: Apache-2.0
"""The browser: what each action asks of a page, and a real Chromium where there is one."""

import builtins
import importlib.util
from collections.abc import Iterator

import pytest

from starkv.errors import UsageError
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
from starkv.runtime.agents import browser
from starkv.runtime.agents.browser import BrowserEnvironment, BrowserError
from starkv.runtime.agents.browser_keys import playwright_combination
from starkv.runtime.agents.browser_page import perform_on
from starkv.runtime.agents.environment import EnvironmentOptions, UnsupportedActionError

HOME = "https://home.test/"
AT, TO = Point(10, 20), Point(30, 40)


class Recorder:
    """Writes down every call of any method, with its arguments."""

    def __init__(self, calls: list[str], prefix: str = "") -> None:
        self._calls, self._prefix = calls, prefix

    def __getattr__(self, name: str) -> object:
        if name in ("mouse", "keyboard"):
            return Recorder(self._calls, f"{name}.")

        def call(*arguments: object, **named: object) -> None:
            given = [*map(repr, arguments), *(f"{key}={value!r}" for key, value in named.items())]
            self._calls.append(f"{self._prefix}{name}({', '.join(given)})")

        return call


def calls_of(action: Action) -> list[str]:
    calls: list[str] = []
    perform_on(Recorder(calls), action, (1000, 600), HOME)  # type: ignore[arg-type]
    return calls


DRAGGED = ["mouse.move(10, 20)", "mouse.down()", "mouse.move(30, 40, steps=10)", "mouse.up()"]


@pytest.mark.parametrize(
    ("action", "calls"),
    [
        (Click(AT), ["mouse.click(10, 20)"]),
        (DoubleClick(AT), ["mouse.click(10, 20, click_count=2)"]),
        (TripleClick(AT), ["mouse.click(10, 20, click_count=3)"]),
        (RightClick(AT), ["mouse.click(10, 20, button='right')"]),
        (LongPress(AT), ["mouse.click(10, 20, delay=800)"]),
        (Hover(AT), ["mouse.move(10, 20)"]),
        (Drag(AT, TO), DRAGGED),
        (Select(AT, TO), DRAGGED),
        (Scroll("down", AT), ["mouse.move(10, 20)", "mouse.wheel(0.0, 300.0)"]),
        (Scroll("up"), ["mouse.wheel(0.0, -300.0)"]),
        (Scroll("left"), ["mouse.wheel(-500.0, 0.0)"]),
        (TypeText("a\nb"), ["keyboard.insert_text('a\\nb')"]),
        (TypeText("a\n"), ["keyboard.insert_text('a')", "keyboard.press('Enter')"]),
        (TypeText("\n"), ["keyboard.press('Enter')"]),
        (Press("esc"), ["keyboard.press('Escape')"]),
        (Hotkey(("ctrl", "shift", "left")), ["keyboard.press('Control+Shift+ArrowLeft')"]),
        (Hotkey(("cmd", "a")), ["keyboard.press('Meta+a')"]),
        (KeyDown("shift"), ["keyboard.down('Shift')"]),
        (KeyUp("shift"), ["keyboard.up('Shift')"]),
        (Wait(), ["wait_for_timeout(5000)"]),
        (PressBack(), ["go_back()"]),
        (PressHome(), [f"goto('{HOME}')"]),
    ],
)
def test_what_an_action_asks_of_a_page(action: Action, calls: list[str]) -> None:
    assert calls_of(action) == calls


def test_a_scroll_goes_only_one_way() -> None:
    (call,) = calls_of(Scroll("right"))
    assert call in ("mouse.wheel(500.0, 0.0)", "mouse.wheel(500.0, -0.0)")


def test_what_a_browser_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedActionError, match="can't do OpenApp"):
        calls_of(OpenApp("mail"))
    with pytest.raises(UnsupportedActionError, match="no key 'hyper'"):
        playwright_combination(("ctrl", "hyper"))


@pytest.mark.parametrize(
    ("url", "words"),
    [(None, "--url https://"), ("", "--url https://"), ("example.com", "write https://example.com")],
)
def test_a_page_to_begin_with_is_needed(url: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BrowserEnvironment(EnvironmentOptions(url=url))


def test_a_missing_playwright_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("playwright"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BrowserError, match=r"pip install 'starkv\[browser\]'"):
        BrowserEnvironment(EnvironmentOptions(url="about:blank"))


def test_playwright_errors_become_ours_and_others_stay() -> None:
    error = type("Error", (Exception,), {"__module__": "playwright._impl._errors"})
    with (
        pytest.raises(UnsupportedActionError, match=r"^Click: timed out$"),
        browser._failing("Click", UnsupportedActionError),
    ):
        raise error("timed out\nmany more lines")
    with pytest.raises(ZeroDivisionError), browser._failing("Click", UnsupportedActionError):
        raise ZeroDivisionError


PAGE = """data:text/html,<body style="margin:0">
<button style="position:absolute;left:100px;top:50px;width:80px;height:30px"
 onclick="this.style.background='rgb(255,0,0)'"></button>
<input style="position:absolute;left:300px;top:50px;width:100px;height:30px"
 onkeydown="if(event.key=='Enter'&&this.value=='hi')document.body.style.background='rgb(0,255,0)'">"""


@pytest.fixture
def chromium() -> Iterator[BrowserEnvironment]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("Playwright is not installed")
    try:
        environment = BrowserEnvironment(EnvironmentOptions(url=PAGE))
    except BrowserError as error:
        pytest.skip(str(error))
    yield environment
    environment.close()


def test_a_real_browser_clicks_and_types(chromium: BrowserEnvironment) -> None:
    assert chromium.screenshot().size == browser.VIEWPORT
    chromium.perform(Click(Point(140, 65)))
    assert chromium.screenshot().getpixel((140, 65)) == (255, 0, 0)
    chromium.perform(Click(Point(350, 65)))
    chromium.perform(TypeText("hi\n"))
    assert chromium.screenshot().getpixel((600, 600)) == (0, 255, 0)
