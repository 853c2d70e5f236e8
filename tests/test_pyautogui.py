# SPDX-License-Identifier: Apache-2.0
"""OpenCUA's replies: calls with plain values become typed actions, all else is refused, nothing runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starkv.runtime.actions.coordinates import Size, to_json
from starkv.runtime.actions.parser import ActionParseError
from starkv.runtime.actions.pyautogui_code import parse_pyautogui
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
    Point,
    Press,
    RightClick,
    Scroll,
    TripleClick,
    TypeText,
    Wait,
)

P = Point(12.5, 40)


@pytest.mark.parametrize(
    ("code", "actions"),
    [
        ("pyautogui.click(x=12.5, y=40)", [Click(P)]),
        ("pyautogui.click(12.5, 40)", [Click(P)]),
        ("pyautogui.click(x=12.5, y=40, clicks=2)", [DoubleClick(P)]),
        ("pyautogui.click(x=12.5, y=40, clicks=3, interval=0.1)", [TripleClick(P)]),
        ("pyautogui.click(x=12.5, y=40, button='right')", [RightClick(P)]),
        ("pyautogui.doubleClick(x=12.5, y=40)", [DoubleClick(P)]),
        ("pyautogui.rightClick(x=12.5, y=40)", [RightClick(P)]),
        ("computer.triple_click(x=12.5, y=40)", [TripleClick(P)]),
        ("pyautogui.moveTo(x=12.5, y=40)", [Hover(P)]),
        ("pyautogui.moveTo(12.5, 40, 0.5)\npyautogui.dragTo(3, 4, button='left')", [Drag(P, Point(3, 4))]),
        ("pyautogui.click(12.5, 40); pyautogui.dragTo(x=3, y=4)", [Click(P), Drag(P, Point(3, 4))]),
        ("pyautogui.write(message='a \"b\"\\n')", [TypeText('a "b"\n')]),
        ("pyautogui.typewrite('it\\'s')", [TypeText("it's")]),
        ("pyautogui.write('''two\nlines''')", [TypeText("two\nlines")]),
        ("pyautogui.press('Enter')", [Press("enter")]),
        ("pyautogui.press(keys=['down', 'A'])", [Press("down"), Press("A")]),
        ("pyautogui.press('tab', presses=3)", [Press("tab")] * 3),
        ("pyautogui.hotkey('ctrl', 'C')", [Hotkey(("ctrl", "C"))]),
        ("pyautogui.hotkey(['ctrl', 'shift', 's'])", [Hotkey(("ctrl", "shift", "s"))]),
        ("pyautogui.hotkey(keys=['ctrl', 'v'])", [Hotkey(("ctrl", "v"))]),
        ("pyautogui.keyDown('shift')\npyautogui.keyUp('shift')", [KeyDown("shift"), KeyUp("shift")]),
        ("pyautogui.scroll(-5)", [Scroll("down")]),
        ("pyautogui.scroll(5, x=12.5, y=40)", [Scroll("up", P)]),
        ("pyautogui.hscroll(3)", [Scroll("right")]),
        ("import pyautogui\nimport time\ntime.sleep(2)", [Wait()]),
        ("computer.wait()", [Wait()]),
        ("computer.terminate(status='success')", [Finished()]),
        ("computer.terminate(status='failure', answer='no')", [CallUser()]),
    ],
)
@pytest.mark.parametrize(
    "form", ["{}", "```python\n{}\n```", "  {}<|im_end|>", "## Code:\n```code\n{}\n```\n"]
)
def test_calls(code: str, actions: list[Action], form: str) -> None:
    assert list(parse_pyautogui(form.format(code)).actions) == actions


@pytest.mark.parametrize(
    ("reply", "thought"),
    [
        (
            "## Thought:\nIt is on the left.\n\n## Action:\nClick it.\n\n## Code:\n```python\n{}\n```",
            "It is on the left.",
        ),
        ("Thought: a\nb\nAction: Click.\n```python\n{}\n```", "a\nb"),
        ("I click.\n\nCode:\n{}", "I click."),
        ("{}", ""),
        ("Use ```python\nprint()\n``` or ```python\n{}\n```", "Use ```python\nprint()\n``` or"),
        ("I would do pyautogui.press('x').\n```python\n{}\n```", "I would do pyautogui.press('x')."),
    ],
)
def test_thoughts(reply: str, thought: str) -> None:
    text = reply.format("pyautogui.click(x=12.5, y=40)")
    parsed = parse_pyautogui(text)
    assert (parsed.thought, parsed.actions, parsed.text) == (thought, (Click(P),), text)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("Just words.", "no call"),
        ("pyautogui.click()", "x of pyautogui.click is no number"),
        ("pyautogui.click(x='1', y=2)", "is no number"),
        ("pyautogui.click(x=True, y=2)", "is no number"),
        ("pyautogui.click(x=1e400, y=2)", "is no number"),
        ("pyautogui.click(x=1, y=2, button='middle')", "no action for 1 clicks"),
        ("pyautogui.click(x=1, y=2, clicks=9)", "no action for 9 clicks"),
        ("pyautogui.click(1, 2, x=3)", "x twice"),
        ("pyautogui.click(1, 2, 1, 0, 'left', 6)", "at most 5"),
        ("pyautogui.click(x=1, y=2, z=3)", "takes no z"),
        ("pyautogui.click(**{'x': 1})", "** arguments"),
        ("pyautogui.dragTo(1, 2)", "needs a moveTo"),
        ("pyautogui.scroll(0)", "nothing"),
        ("pyautogui.press('a', presses=1000000000)", "presses is no number"),
        ("pyautogui.press('a', presses=500)", "not 1 to 100"),
        ("pyautogui.press([])", "needs a key"),
        ("pyautogui.hotkey()", "needs keys"),
        ("pyautogui.keyDown(['a', 'b'])", "one key"),
        ("pyautogui.write(5)", "needs a text"),
        ("computer.terminate(status='maybe')", "success or failure"),
        ("pyautogui.screenshot('x.png')", "unknown call pyautogui.screenshot"),
        ("pyautogui.click(x=1, y=2", "no Python"),
        ("pyautogui.click(x=1, y=2) if 1 else 0", "is no call"),
        ("x = 1\npyautogui.click(x=x, y=2)", "no Python|no call|no plain value"),
        ("```python\nfor i in range(9):\n    pyautogui.click(x=1, y=2)\n```", "is no call"),
        ("```python\n__import__('os').system('x')\npyautogui.click(x=1, y=2)\n```", "something unknown"),
        ("pyautogui.write(open('/etc/passwd').read())", "no plain value"),
        ("pyautogui.write(f'{1}')", "no plain value"),
        ("pyautogui.write('a' * 10**9)", "no plain value"),
        ("pyautogui.click(x=" + "-" * 15000 + "1, y=2)", "can't be read|no Python"),
        ("pyautogui.write('" + "a" * 30000 + "')", "too long"),
        ("```python\nimport pyautogui\npyautogui.press\n```pyautogui.click(", "no Python|no call"),
    ],
)
def test_everything_else_is_refused(code: str, reason: str) -> None:
    with pytest.raises(ActionParseError) as failure:
        parse_pyautogui(code)
    assert any(part in failure.value.reason for part in reason.split("|")), failure.value.reason
    assert failure.value.text == code


@given(st.text(alphabet="pyautogi.clk(x=1,'\\\"\n`[]*-){} ", max_size=80))
def test_no_reply_breaks_the_parser(text: str) -> None:
    for reply in (text, f"pyautogui.click({text}", f"```python\npyautogui.write({text})\n```"):
        try:
            actions = parse_pyautogui(reply).actions
        except ActionParseError:
            continue
        assert actions


def test_triple_clicks_have_a_json_form() -> None:
    json = to_json(TripleClick(Point(10, 20)), Size(100, 100), Size(200, 200), "absolute")
    assert json == {"type": "triple_click", "model_xy": [10, 20], "screen_xy": [20, 40]}
