# SPDX-License-Identifier: Apache-2.0
"""The parser on every dialect, on broken replies, on noise, and against the official package."""

import ast
import json
import warnings
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from starkv.errors import StarkvError
from starkv.runtime.actions.parser import ActionParseError, parse_response
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
    TypeText,
    Wait,
)

HERE = Point(12, 34)


def only(text: str) -> Action:
    (action,) = parse_response(text).actions
    return action


@pytest.mark.parametrize(
    "place",
    [
        "'(12,34)'",
        "'(12, 34)'",
        '"(12,34)"',
        "'<point>12 34</point>'",
        "'<|box_start|>(12,34)<|box_end|>'",
        "'[12,34]'",
        "'[10,30,14,38]'",
        "'(10,30,14,38)'",
        "'<bbox>10 30 14 38</bbox>'",
        "'<|box_start|>(10,30),(14,38)<|box_end|>'",
        "'12 34'",
        "'12,34'",
        "' ( 12.0 , 34.0 ) '",
        "(12,34)",
        "[10,30,14,38]",
        "<point>12 34</point>",
        "<|box_start|>(12,34)<|box_end|>",
        "'<point>12 34</point>''",
    ],
)
@pytest.mark.parametrize("argument", ["start_box", "point", "start_point"])
def test_every_notation_of_a_place(argument: str, place: str) -> None:
    assert only(f"Thought: x\nAction: click({argument}={place})") == Click(HERE)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("click(point='(12,34)')", Click(HERE)),
        ("left_single(point='(12,34)')", Click(HERE)),
        ("left_double(point='(12,34)')", DoubleClick(HERE)),
        ("right_single(point='(12,34)')", RightClick(HERE)),
        ("hover(point='(12,34)')", Hover(HERE)),
        ("long_press(point='(12,34)')", LongPress(HERE)),
        ("drag(start_box='(12,34)', end_box='(5,6)')", Drag(HERE, Point(5, 6))),
        ("drag(end_point='<point>5 6</point>',start_point='<point>12 34</point>')", Drag(HERE, Point(5, 6))),
        ("select(start_box='(12,34)', end_box='(5,6)')", Select(HERE, Point(5, 6))),
        ("hotkey(key='ctrl c')", Hotkey(("ctrl", "c"))),
        ("hotkey(hotkey='Ctrl+Shift+ArrowLeft')", Hotkey(("ctrl", "shift", "left"))),
        ("hotkey(key='ctrl +')", Hotkey(("ctrl", "+"))),
        ("hotkey(key='ctrl++')", Hotkey(("ctrl", "+"))),
        ("hotkey(key='+')", Hotkey(("+",))),
        ("press(key='Enter')", Press("enter")),
        ("press(press='A')", Press("A")),
        ("keydown(key='shift')", KeyDown("shift")),
        ("keyup(key='shift')", KeyUp("shift")),
        ("release(key='shift')", KeyUp("shift")),
        ("type(content='hello')", TypeText("hello")),
        ("type(content='')", TypeText("")),
        ("scroll(point='(12,34)', direction='down')", Scroll("down", HERE)),
        ("scroll(direction='UP')", Scroll("up", None)),
        ("scroll(start_box='', direction='left')", Scroll("left", None)),
        ("wait()", Wait()),
        ("wait( )", Wait()),
        ("open_app(app_name='Settings')", OpenApp("Settings")),
        ("press_home()", PressHome()),
        ("press_back()", PressBack()),
        ("finished()", Finished("")),
        ("finished(content='42 €')", Finished("42 €")),
        ("call_user()", CallUser()),
    ],
)
def test_every_action(call: str, expected: Action) -> None:
    assert only(f"Thought: because\nAction: {call}") == expected
    assert only(call) == expected


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"it\'s", "it's"),
        ("it's", "it's"),
        (r"say \"hi\"\n", 'say "hi"\n'),
        ('say "hi"', 'say "hi"'),
        ("line one\nline two", "line one\nline two"),
        ("f('a')", "f('a')"),
        ("f('a'), g(b='c')", "f('a'), g(b='c')"),
        ("f('a')g()", "f('a')g()"),
        ("print('x')\n", "print('x')\n"),
        (r"C:\\temp\\new", r"C:\temp\new"),
        (r"regex \d+", r"regex \d+"),
        ("Action: wait()", "Action: wait()"),
        ("a\nAction: wait()", "a\nAction: wait()"),
        ("os.system('rm -rf /')", "os.system('rm -rf /')"),
        ("a, content of b", "a, content of b"),
    ],
)
def test_typed_text(written: str, meant: str) -> None:
    assert only(f"Action: type(content='{written}')") == TypeText(meant)


@pytest.mark.parametrize(
    ("text", "thought", "reflection"),
    [
        ("Thought: go on\nAction: wait()", "go on", ""),
        ("Thought: two\nlines\n\nAction: wait()", "two\nlines", ""),
        ("Thought: go on Action: wait()", "go on", ""),
        ("Reflection: that failed\nAction_Summary: again\nAction: wait()", "again", "that failed"),
        ("Action_Summary: again\nAction: wait()", "again", ""),
        ("<think>deep</think>\nAction: wait()", "deep", ""),
        (
            "<think>deep\nAction: not this one</think>\nThought: short\nAction: wait()",
            "deep\nAction: not this one\nshort",
            "",
        ),
        ("<think>deep</think>wait()", "deep", ""),
        ("no label\nAction: wait()", "no label", ""),
        ("Action: wait()", "", ""),
        ("wait()", "", ""),
        ("Thought: my last Action: failed.\nAction: wait()", "my last Action: failed.", ""),
        ("思考。Action：wait()", "思考。", ""),
    ],
)
def test_thoughts(text: str, thought: str, reflection: str) -> None:
    parsed = parse_response(text)
    assert (parsed.thought, parsed.reflection) == (thought, reflection)
    assert parsed.actions == (Wait(),)
    assert parsed.text == text


@pytest.mark.parametrize("gap", ["\n\n", "\n", " ", "\nAction: ", "; "])
def test_several_actions(gap: str) -> None:
    text = f"Thought: x\nAction: click(point='(12,34)'){gap}type(content='it's'){gap}wait()"
    assert parse_response(text).actions == (Click(HERE), TypeText("it's"), Wait())


@pytest.mark.parametrize("end", ["", "\n", "<|im_end|>", "[EOS]", "\n```", "\n<|im_end|>\n<|endoftext|>"])
@pytest.mark.parametrize("begin", ["Action: ", "Action:\n```\n", "Action: ```python\n"])
def test_leftovers_of_decoders_and_fences(begin: str, end: str) -> None:
    assert only(f"Thought: x\n{begin}type(content='a'){end}") == TypeText("a")


@pytest.mark.parametrize(
    ("text", "reason", "at"),
    [
        ("", "no call was found", ""),
        ("Thought: I am lost", "no call was found", "Thought"),
        ("Action:", "no call was found", "Action"),
        ("<think>on and on\nAction: wait()", "the thought never ends", "<think>"),
        ("Action: clik(point='(1,2)')", "unknown action 'clik'", "clik"),
        ("Action: click()", "start is missing", "click"),
        ("Action: click(point='')", "start is missing", "click"),
        ("Action: click(point='(1,2,3)')", "'(1,2,3)' is no point", "click"),
        ("Action: click(point='(1,2]')", "is no point", "click"),
        ("Action: click(point='(1e400,2)')", "is no point", "click"),
        ("Action: click(point='here')", "is no point", "click"),
        ("Action: click(point='__import__(\"os\")')", "is no point", "click"),
        ("Action: click(point=(1,2)", "expected ',' or ')'", ""),
        ("Action: click(point='(1,2)'", "no quote closes", "'(1,2)'"),
        ("Action: click(point='(1,2)', point='(1,2)')", "given twice", "point='(1,2)')"),
        ("Action: click(colour='red')", "unknown argument", "colour"),
        ("Action: click(content='x')", "click takes no content", "click"),
        ("Action: click('(1,2)')", "expected an argument", "'(1,2)'"),
        ("Action: drag(start_box='(1,2)')", "end is missing", "drag"),
        ("Action: hotkey(key=' ')", "key is missing", "hotkey"),
        ("Action: scroll(direction='sideways')", "'sideways' is none of", "scroll"),
        ("Action: scroll(point='(1,2)')", "direction is missing", "scroll"),
        ("Action: type()", "needs a content", "type"),
        ("Action: type(content=hello)", "expected a quoted value", "hello"),
        ("Action: type(content='half", "no quote closes", "'half"),
        ("Action: wait() and then some", "text that is no call", "and"),
        ("Action: wait()\n\nThought: now\nAction: press_back()", "text that is no call", "Thought"),
    ],
)
def test_broken_replies_are_refused_with_reason_and_place(text: str, reason: str, at: str) -> None:
    with pytest.raises(ActionParseError) as caught:
        parse_response(text)
    assert reason in caught.value.reason
    assert text[caught.value.position :].startswith(at)
    assert caught.value.text == text
    assert isinstance(caught.value, StarkvError)
    assert "\n" not in str(caught.value)


def test_a_later_action_never_runs_for_an_earlier_one_that_was_not_understood() -> None:
    for text in ("Action: clik(point='(1,2)')\n\nwait()", "Action: clik(point='(1,2)')\nAction: wait()"):
        with pytest.raises(ActionParseError, match="clik"):
            parse_response(text)


# Pieces of real replies in random order reach far deeper into the parser than random characters.
WORDS = """\
Thought: Action: Reflection: Action_Summary: <think> </think> click type scroll( wait() ( ) ' " \\ , = [ ]
- 1 23.5 é ``` start_box point content <point> </point> <bbox> <|box_start|> <|box_end|> direction='up'
click(start_box='(1,2)') type(content='
"""
PIECES = st.sampled_from([*WORDS.split(), " ", "\n"])


@settings(deadline=None, max_examples=600)
@given(text=st.one_of(st.text(), st.lists(PIECES, max_size=25).map("".join)))
@example("Action: type(content='" * 50)
@example("Action: " + "\\" * 99)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        assert parse_response(text).actions
    except ActionParseError as error:
        refused = error
    else:
        return
    assert 0 <= refused.position <= len(text)


def test_long_hostile_replies_are_refused_quickly() -> None:
    for text in (
        "Action: type(content='" + "')" * 20_000 + "x",
        "Action: type(content='" + "') " * 20_000 + "x",
        "Action: click(point='" + " " * 20_000 + "x')",
        "Action: click(point='(1" + " " * 3_000 + "x')",
        "Action: a\n" * 20_000,
    ):
        with pytest.raises(ActionParseError):
            parse_response(text)


NUMBERS = st.one_of(st.integers(0, 9999), st.integers(0, 99_999).map(lambda n: n / 10)).map(float)
POINTS = st.builds(Point, NUMBERS, NUMBERS)
CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
KEYS = st.sampled_from(["ctrl", "shift", "enter", "left", "a", "Z", "+", "f5"])
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    *(st.builds(kind, POINTS) for kind in (Click, DoubleClick, RightClick, Hover, LongPress)),
    *(st.builds(kind, POINTS, POINTS) for kind in (Drag, Select)),
    *(st.builds(kind, KEYS) for kind in (Press, KeyDown, KeyUp)),
    st.builds(Hotkey, st.lists(KEYS, min_size=1, max_size=3).map(tuple)),
    st.builds(Scroll, st.sampled_from(["up", "down", "left", "right"]), st.one_of(st.none(), POINTS)),
    *(st.builds(kind, CONTENT) for kind in (TypeText, Finished)),
    st.builds(OpenApp, st.sampled_from(["Maps", 'It\'s (me), "Mario"'])),
    *(st.builds(kind) for kind in (Wait, PressHome, PressBack, CallUser)),
)
NAMES: dict[type[Action], str] = {
    Click: "click",
    DoubleClick: "left_double",
    RightClick: "right_single",
    Hover: "hover",
    LongPress: "long_press",
    Drag: "drag",
    Select: "select",
    Press: "press",
    KeyDown: "keydown",
    KeyUp: "release",
    Hotkey: "hotkey",
    Scroll: "scroll",
    TypeText: "type",
    Finished: "finished",
    OpenApp: "open_app",
    Wait: "wait",
    PressHome: "press_home",
    PressBack: "press_back",
    CallUser: "call_user",
}
PLACES = {
    "parentheses": "({x},{y})",
    "box tokens": "<|box_start|>({x},{y})<|box_end|>",
    "point tag": "<point>{x} {y}</point>",
    "list": "[{x}, {y}]",
    "degenerate box": "[{x},{y},{x},{y}]",
    "bbox tag": "<bbox>{x} {y} {x} {y}</bbox>",
}


def write(action: Action, dialect: str, quote: str) -> str:
    """Write an action the way a model of some dialect would."""

    def quoted(value: str) -> str:
        escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"').replace("\n", "\\n")
        return quote + escaped + quote

    def argument(name: str, value: object) -> str:
        if isinstance(value, Point):
            name = {"end": "end_box"}.get(name, "start_box")
            if dialect == "point tag":
                name = {"end_box": "end_point", "start_box": "point"}[name]
            return f"{name}={quoted(PLACES[dialect].format(x=value.x, y=value.y))}"
        if isinstance(value, tuple):
            return f"key={quoted(' '.join(value))}"
        return f"{'app_name' if name == 'name' else name}={quoted(str(value))}"

    fields = [(name, value) for name, value in vars(action).items() if value is not None and value != ""]
    if isinstance(action, TypeText):
        fields = [("content", action.content)]
    return f"{NAMES[type(action)]}({', '.join(argument(name, value) for name, value in fields)})"


@settings(deadline=None, max_examples=300)
@given(
    actions=st.lists(ACTIONS, min_size=1, max_size=3),
    dialect=st.sampled_from(sorted(PLACES)),
    quote=st.sampled_from(["'", '"']),
    gap=st.sampled_from(["\n\n", "\n"]),
)
def test_what_was_written_is_read(actions: list[Action], dialect: str, quote: str, gap: str) -> None:
    text = "Thought: a plan\nAction: " + gap.join(write(action, dialect, quote) for action in actions)
    parsed = parse_response(text)
    assert parsed.actions == tuple(actions)
    assert parsed.thought == "a plan"


OFFICIAL_CALLS = [
    ("click(start_box='(100,200)')", Click(Point(100, 200))),
    ("click(start_box='(100,200,300,400)')", Click(Point(200, 300))),
    ("click(point='<point>100 200</point>')", Click(Point(100, 200))),
    ("left_double(point='<point>7 900</point>')", DoubleClick(Point(7, 900))),
    (
        "drag(start_point='<point>1 2</point>', end_point='<point>3 4</point>')",
        Drag(Point(1, 2), Point(3, 4)),
    ),
    ("scroll(start_box='(5,6)', direction='down')", Scroll("down", Point(5, 6))),
    ("hotkey(key='ctrl c')", Hotkey(("ctrl", "c"))),
    ("press(key='enter')", Press("enter")),
    ("type(content='hello world')", TypeText("hello world")),
    ("type(content='it's \"quoted\"')", TypeText('it\'s "quoted"')),
    ("type(content='submit\\n')", TypeText("submit\n")),
    ("open_app(app_name='Maps')", OpenApp("Maps")),
    ("finished(content='done')", Finished("done")),
    ("wait()", Wait()),
]


@pytest.mark.parametrize(("call", "expected"), OFFICIAL_CALLS)
@pytest.mark.parametrize("prefix", ["Thought: I see it.", "Reflection: hm.\nAction_Summary: I see it."])
def test_parity_with_the_official_parser(call: str, expected: Action, prefix: str) -> None:
    """``ui-tars`` gives strings and places relative to the image; ours must say the same with types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package uses a deprecated part of ``ast``
        official = pytest.importorskip("ui_tars.action_parser", reason="ui-tars is not installed")
        text = f"{prefix}\nAction: {call}"
        height, width = 1008, 1512  # a fixed point of smart_resize, so the package divides by it
        (theirs,) = official.parse_action_to_structure_output(text, 1000, height, width, "qwen25vl")
    ours = parse_response(text)
    assert ours.actions == (expected,)
    assert ours.thought == theirs["thought"]
    assert ours.reflection == (theirs["reflection"] or "")
    assert NAMES[type(expected)] == theirs["action_type"]

    def place(value: str) -> Point:
        x1, y1, x2, y2 = ast.literal_eval(value)
        return Point(round((x1 + x2) / 2 * width, 6), round((y1 + y2) / 2 * height, 6))

    inputs: dict[str, Any] = theirs["action_inputs"]
    fields = {name: value for name, value in vars(expected).items() if value not in (None, "")}
    assert len(inputs) == len(fields)
    for name, value in fields.items():
        if isinstance(value, Point):
            assert place(inputs["end_box" if name == "end" else "start_box"]) == value
        else:
            (found,) = (text for key, text in inputs.items() if key in (name, "key", "app_name", "content"))
            assert found == (" ".join(value) if isinstance(value, tuple) else value), json.dumps(inputs)
