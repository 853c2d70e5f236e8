# SPDX-License-Identifier: Apache-2.0
"""Prompts: the official words to the byte, in the official order, and whose replies are read how."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from starkv.errors import UsageError
from starkv.manifest import PromptDialect
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, Message
from starkv.runtime.prompts import ui_tars
from starkv.runtime.prompts.dialects import opening, parse_dialect

GUI_TINY = Path(__file__).parent.parent / "models" / "gui-tiny"


@pytest.mark.parametrize(
    ("prompt", "digest"),
    [
        (ui_tars.COMPUTER_USE, "0fd4d14c3890f672de26132b5a8dccf602f413a6187e92b9b182333c7e6bd49b"),
        (ui_tars.MOBILE_USE, "4c6da47a4608edb035dbbf35a6562fc9d18afdd41aeb374089e30ac4d0a6c47f"),
        (ui_tars.GROUNDING, "e0fda4eb0b91efda10238a7441ba86278c4edf0c00e465b79bcc18f13abe5b3f"),
    ],
)
def test_words_are_the_official_ones(prompt: str, digest: str) -> None:
    """The digests were taken from the official files, not from ours."""
    assert hashlib.sha256(prompt.encode()).hexdigest() == digest


def layout(messages: list[Message]) -> list[tuple[object, str]]:
    """Role of each turn and what it holds: ``*`` for an image, ``T`` for text."""
    shown = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text"}] if isinstance(content, str) else content
        assert isinstance(parts, list)
        shown.append((message["role"], "".join("*" if part["type"] == "image" else "T" for part in parts)))
    return shown


@pytest.mark.parametrize(
    ("dialect", "images", "expected"),
    [
        ("plain", 2, [("user", "**T")]),
        ("plain", 0, [("user", "T")]),
        ("ui_tars_computer", 1, [("system", "T"), ("user", "T"), ("user", "*")]),
        ("ui_tars_mobile", 2, [("system", "T"), ("user", "T"), ("user", "*"), ("user", "*")]),
        ("ui_tars_grounding", 0, [("system", "T"), ("user", "T")]),
        ("opencua", 0, [("system", "T"), ("user", "T")]),
        ("opencua", 1, [("system", "T"), ("user", "*T")]),
        ("opencua", 3, [("system", "T"), ("user", "*"), ("user", "*"), ("user", "*T")]),
    ],
)
def test_order_of_words_and_screenshots(
    dialect: PromptDialect, images: int, expected: list[tuple[str, str]]
) -> None:
    assert layout(opening("Click.", images, dialect)) == expected


@pytest.mark.parametrize("dialect", get_args(PromptDialect))
def test_every_dialect_shows_the_instruction_as_it_is(dialect: PromptDialect) -> None:
    instruction = "Type '{language}' {0} into \\ the {box}"
    tokenizer = ChatTokenizer.from_directory(GUI_TINY)
    shown = tokenizer.render(opening(instruction, 1, dialect))
    assert shown.count(instruction) == 1
    assert shown.count("<|image_pad|>") == 1
    assert "{instruction}" not in shown


def test_ui_tars_thinks_in_english() -> None:
    (_, text, _) = opening("Click.", 1, "ui_tars_computer")
    assert text["content"][0]["text"].endswith("## User Instruction\nClick.\n")  # type: ignore[index]
    assert "- Use English in `Thought` part." in text["content"][0]["text"]  # type: ignore[index]


def test_dialects_by_name() -> None:
    assert [parse_dialect(name) for name in get_args(PromptDialect)] == list(get_args(PromptDialect))
    with pytest.raises(UsageError, match="unknown prompt dialect 'tars'; known: plain, ui_tars_computer"):
        parse_dialect("tars")


def test_replies_are_read_in_the_prompts_dialect() -> None:
    from starkv.runtime.agent import understand
    from starkv.runtime.timings import Timings

    seen = SimpleNamespace(resized_width=100, resized_height=100, original_width=200, original_height=200)
    manifest = SimpleNamespace(coordinates="absolute", prompt="opencua")
    engine = SimpleNamespace(manifest=manifest)
    session = SimpleNamespace(images=[seen], engine=engine, finish_reason="stop", timings=Timings())
    click = ({"type": "click", "model_xy": [10, 20], "screen_xy": [20, 40]},)
    code, call = "```python\npyautogui.click(x=10, y=20)\n```", "Action: click(start_box='(10,20)')"
    assert understand(code, session).action_json == click  # type: ignore[arg-type]
    assert understand(call, session).error is not None  # type: ignore[arg-type]
    assert understand(call, session, "ui_tars_computer").action_json == click  # type: ignore[arg-type]
