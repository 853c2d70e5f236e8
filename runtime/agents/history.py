# SPDX-License-Identifier: Apache-2.0
"""What a model is told of the steps before: the last few screenshots, and all that it answered.

UI-TARS and OpenCUA get turns, as their official drivers lay them out: a screenshot, the answer to it, and so
on; older answers stay as text without their screenshot. The plain prompt holds no words but the
instruction's, because models that were trained on it know no others: earlier screenshots show what was acted
on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from starkv.manifest import PromptDialect
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.prompts.dialects import opening

_BOX = re.compile(r"(?<=_box=)(['\"])(\(\s*[0-9.]+\s*,\s*[0-9.]+\s*\))\1")
_CODE = re.compile(r"(?:^|\n)[#\s]*Code[ \t]*:?[ \t]*\n.*|```.*", re.DOTALL)


@dataclass(frozen=True)
class PastStep:
    """A step that was taken."""

    screenshot: Image.Image
    marked: Image.Image
    """The screenshot with what was acted on marked."""
    reply: str
    """As the model wrote it."""


def prompt_of(
    goal: str,
    past: Sequence[PastStep],
    current: Image.Image,
    screenshots: int,
    dialect: PromptDialect,
) -> tuple[list[Message], list[Image.Image]]:
    """The conversation up to now, and its images in their order.

    Args:
        goal: what the user wants.
        past: steps, oldest first.
        current: the screen now.
        screenshots: most of them in the prompt, the current one included; at least 1.
        dialect: words of the prompt.
    """
    shown = past[max(0, len(past) - screenshots + 1) :]
    if dialect == "plain":
        images = [*(step.marked for step in shown), current]
        return opening(goal, len(images), dialect), images
    first = opening(goal, 1, dialect)
    system, task = first[:-1], first[-1]
    messages: list[Message] = [*system]
    hidden = len(past) - len(shown)
    for number, step in enumerate(past):
        if number >= hidden:
            messages.append({"role": "user", "content": [{"type": "image"}]})
        messages.append({"role": "assistant", "content": past_reply(step.reply, dialect)})
    return [*messages, task], [*(step.screenshot for step in shown), current]


def past_reply(reply: str, dialect: PromptDialect) -> str:
    """An answer as the model saw answers in training.

    UI-TARS's places stand between special tokens, which vanish when a reply is decoded. OpenCUA's past steps
    are told in words: its code would be in coordinates of a screenshot that may no longer be shown.
    """
    # What a model copied from a page must not become a special token, such as another image.
    reply = reply.strip().replace("<|", "< |")
    if dialect == "opencua":
        return _CODE.sub("", reply).rstrip() or reply
    if dialect.startswith("ui_tars"):
        return _BOX.sub(r"\1<|box_start|>\2<|box_end|>\1", reply)
    return reply
