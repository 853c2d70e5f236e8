# SPDX-License-Identifier: Apache-2.0
"""Prompts that no calibration has seen, to judge quantization by."""

import importlib
import sys
from pathlib import Path

from PIL import Image

from starkv.calibration.prompts import GuiPrompt, drawn_prompts
from starkv.export.cards import ResolvedModel

FIRST_SCREEN = 1_000_000
"""Calibration draws the screens from 0 on."""
_SIZE = 224
"""Side of a model's own screens in pixels."""
_QUESTIONS = 4
"""Asked about each screen of a model's own."""


def held_out_prompts(model: ResolvedModel, count: int) -> list[GuiPrompt]:
    """Prompts with known boxes: of the test split in the model's folder if it has one, or drawn ones."""
    train = model.folder / "train"
    if (train / "splits.py").is_file():
        return _own_prompts(train, count)
    return drawn_prompts(count, model.card.max_pixels, FIRST_SCREEN)


def _own_prompts(train: Path, count: int) -> list[GuiPrompt]:
    # The training scripts of the embedded model import each other by plain names.
    sys.path.insert(0, str(train))
    try:
        splits = importlib.import_module("splits")
    finally:
        sys.path.remove(str(train))
    prompts: list[GuiPrompt] = []
    for number in range(-(-count // _QUESTIONS)):
        screen, questions = splits.held_out("test", number, _SIZE, _QUESTIONS)
        image = Image.fromarray(screen.image)
        prompts += [
            GuiPrompt(image, question.text, question.answer, question.element.box, question.element.phrase)
            for question in questions
        ]
    return prompts[:count]
