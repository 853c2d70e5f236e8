# SPDX-License-Identifier: Apache-2.0
"""From an instruction and screenshots to the turns that a model expects."""

from collections.abc import Callable
from typing import get_args

from starkv.errors import UsageError
from starkv.manifest import PromptDialect
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.prompts import opencua, ui_tars

LANGUAGE = "English"
"""Of UI-TARS's thoughts."""

_UI_TARS_SYSTEM = "You are a helpful assistant."


def parse_dialect(name: str) -> PromptDialect:
    """Check a dialect's name.

    Raises:
        UsageError: no such dialect.
    """
    if name not in _OPENINGS:
        raise UsageError(f"unknown prompt dialect {name!r}; known: {', '.join(_OPENINGS)}")
    known: PromptDialect = next(dialect for dialect in get_args(PromptDialect) if dialect == name)
    return known


def opening(instruction: str, images: int, dialect: PromptDialect) -> list[Message]:
    """The turns that begin a conversation, with one image part for each of ``images`` screenshots."""
    return _OPENINGS[dialect](instruction, images)


def user_turn(text: str, images: int) -> Message:
    """A user's turn with so many screenshots before its text: all of a plain prompt, and every turn after the
    first of any dialect."""
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def _plain(instruction: str, images: int) -> list[Message]:
    return [user_turn(instruction, images)]


def _ui_tars(prompt: str) -> Callable[[str, int], list[Message]]:
    def begin(instruction: str, images: int) -> list[Message]:
        text = prompt.format(language=LANGUAGE, instruction=instruction)
        # The prompt comes first and every screenshot is a turn of its own, as in the project's test messages.
        return [
            {"role": "system", "content": _UI_TARS_SYSTEM},
            {"role": "user", "content": [{"type": "text", "text": text}]},
            *([{"role": "user", "content": [{"type": "image"}]}] * images),
        ]

    return begin


def _opencua(instruction: str, images: int) -> list[Message]:
    # Earlier screenshots are turns of their own; the last one shares its turn with the task.
    earlier: list[Message] = [{"role": "user", "content": [{"type": "image"}]}] * (images - 1)
    task = user_turn(opencua.INSTRUCTION.format(instruction=instruction), min(images, 1))
    return [{"role": "system", "content": opencua.SYSTEM}, *earlier, task]


_OPENINGS: dict[PromptDialect, Callable[[str, int], list[Message]]] = {
    "plain": _plain,
    "ui_tars_computer": _ui_tars(ui_tars.COMPUTER_USE),
    "ui_tars_mobile": _ui_tars(ui_tars.MOBILE_USE),
    "ui_tars_grounding": _ui_tars(ui_tars.GROUNDING),
    "opencua": _opencua,
}
