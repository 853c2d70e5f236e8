# SPDX-License-Identifier: Apache-2.0
"""Prompts that a packed cache is calibrated on: the model's own work, as far as we know it."""

from itertools import islice
from pathlib import Path

from starkv.calibration.held_out import EMBEDDED, NAMED_TASKS, prompt_of_sample
from starkv.calibration.prompts import GuiPrompt, drawn_prompts, read_prompts
from starkv.synthetic.suite import click_samples

SCREENS = 48


def kv_prompts(model: str, max_pixels: int, folder: Path | None = None) -> list[GuiPrompt]:
    """A user's prompts if there is a folder of them; questions of the training split for the embedded model,
    which knows no other screens; drawn desktops for all others.

    Raises:
        UsageError: the folder holds no prompts, or a wrong one.
        ImageError: an image can't be read.
    """
    if folder is not None:
        return read_prompts(folder)
    if model != EMBEDDED:
        return drawn_prompts(SCREENS, max_pixels)
    samples = (sample for sample in click_samples("train", 0, 4 * SCREENS) if sample.task in NAMED_TASKS)
    return [prompt_of_sample(sample) for sample in islice(samples, SCREENS)]
