# SPDX-License-Identifier: Apache-2.0
"""Prompts with a screenshot: drawn ones, and a user's own from a folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from starkv.calibration.screens import draw_screen
from starkv.errors import UsageError
from starkv.runtime.preprocess.image import load_image
from starkv.synthetic.widgets import Box

PROMPTS_FILE = "prompts.jsonl"
IMAGE_TOKENS = 256
"""Most tokens of a drawn screen: enough for legible text, few enough for many screens."""
CALIBRATION_SCREENS = 48
"""Drawn for a calibration, which takes as many of them as its budget of tokens allows."""
VERBS = ("Click", "Click on", "Press", "Tap")
_CELL = 28
_ASPECTS = (16 / 9, 1.0, 16 / 10, 4 / 3, 9 / 16)


@dataclass(frozen=True)
class GuiPrompt:
    """An instruction on a screenshot, and what the right answer is."""

    image: Image.Image
    """RGB."""
    instruction: str
    reply: str | None = None
    """What the model should say; if None, a click on the centre of ``box`` in its own dialect."""
    box: Box | None = None
    """Pixels of ``image`` in which a click is right, or None where nobody knows."""
    phrase: str = ""
    """What the instruction wants clicked."""


def drawn_prompts(count: int, max_pixels: int, first: int = 0) -> list[GuiPrompt]:
    """Instructions on drawn screens, one each.

    Args:
        count: how many.
        max_pixels: what the model takes; screens are drawn no larger than ``IMAGE_TOKENS`` either.
        first: number of the first screen; others draw other screens.
    """
    area = min(max_pixels, IMAGE_TOKENS * _CELL**2)
    prompts = []
    for number in range(first, first + count):
        random = np.random.default_rng([20260, number])
        aspect = _ASPECTS[number % len(_ASPECTS)]
        height = max(1, round((area / aspect) ** 0.5 / _CELL))
        width = max(1, int(area / _CELL**2) // height)
        screen = draw_screen(random, width * _CELL, height * _CELL)
        target = screen.targets[random.integers(len(screen.targets))]
        text = f"{VERBS[random.integers(len(VERBS))]} {target.phrase}."
        prompts.append(GuiPrompt(screen.image, text, box=target.box, phrase=target.phrase))
    return prompts


class _Line(BaseModel):
    """One line of ``prompts.jsonl``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str
    prompt: str
    reply: str
    box: tuple[int, int, int, int] | None = None


def read_prompts(folder: Path) -> list[GuiPrompt]:
    """Read a user's own prompts: ``prompts.jsonl`` and the images that it names, relative to the folder.

    A line is ``{"image": "a.png", "prompt": "…", "reply": "…"}``, with ``"box": [x0, y0, x1, y1]`` if it is
    known where a click is right.

    Raises:
        UsageError: the file is missing, empty, or a line is wrong.
        ImageError: an image can't be read.
    """
    path = folder / PROMPTS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f'{path} can\'t be read ({error}); each of its lines is a prompt {{"image", "prompt", "reply"}}'
        ) from None
    prompts = [
        _read_line(line, f"{path}, line {number}", folder)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise UsageError(f"{path} holds no prompts")
    return prompts


def _read_line(line: str, where: str, folder: Path) -> GuiPrompt:
    try:
        read = _Line.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the line"
        raise UsageError(f"{where}: {field}: {first['msg']}") from None
    return GuiPrompt(load_image(folder / read.image), read.prompt, read.reply, read.box)


def prompts_from(folder: Path | None, max_pixels: int) -> list[GuiPrompt]:
    """A user's prompts if there is a folder of them, drawn ones otherwise."""
    return read_prompts(folder) if folder else drawn_prompts(CALIBRATION_SCREENS, max_pixels)
