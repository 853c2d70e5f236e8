# SPDX-License-Identifier: Apache-2.0
"""Prompts that no calibration has seen, to judge quantization by."""

from itertools import islice

from PIL import Image

from starkv.calibration.prompts import GuiPrompt, drawn_prompts
from starkv.export.cards import ResolvedModel
from starkv.synthetic.questions import VERBS
from starkv.synthetic.samples import Sample
from starkv.synthetic.suite import click_samples

FIRST_SCREEN = 1_000_000
"""Calibration draws the screens from 0 on."""
EMBEDDED = "gui-tiny"
"""The model that was trained on the synthetic suite, and is judged by its test split."""
NAMED_TASKS = ("icon", "word")
"""Tasks whose questions name their target."""


def held_out_prompts(model: ResolvedModel, count: int) -> list[GuiPrompt]:
    """Prompts with known boxes: of the synthetic suite for the embedded model, drawn desktops for others."""
    if model.card.name != EMBEDDED:
        return drawn_prompts(count, model.card.max_pixels, FIRST_SCREEN)
    # Every screen has at least one of each three questions.
    samples = (sample for sample in click_samples("test", 0, 4 * count) if sample.task in NAMED_TASKS)
    return [prompt_of_sample(sample) for sample in islice(samples, count)]


def prompt_of_sample(sample: Sample) -> GuiPrompt:
    """A question of the synthetic suite that names its target, as a prompt."""
    # The longest verb first: one begins with another.
    verb = next(v for v in sorted(VERBS, key=len, reverse=True) if sample.question.startswith(f"{v} "))
    phrase = sample.question.removeprefix(f"{verb} ").removesuffix(".")
    return GuiPrompt(Image.fromarray(sample.frames[0]), sample.question, sample.answer, sample.box, phrase)
