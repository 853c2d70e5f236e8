# SPDX-License-Identifier: Apache-2.0
"""Questions of ``starkv validate clicks``: screens as the model knows them."""

from starkv.calibration.held_out import EMBEDDED, FIRST_SCREEN
from starkv.calibration.prompts import GuiPrompt, drawn_prompts
from starkv.evaluation.samples import Sample
from starkv.evaluation.suites.synthetic import Task, load, single_click
from starkv.manifest import Manifest
from starkv.runtime.preprocess.image import png_bytes

SPLIT = "test"


def click_samples(manifest: Manifest, task: Task, count: int, seed: int) -> list[Sample]:
    """Samples for a model: of the synthetic suite, or for single clicks of other models than the embedded one
    drawn desktops, on which calibration has never been.

    Args:
        manifest: of the engine.
        task: single clicks or trajectories.
        count: how many.
        seed: of the drawing.
    """
    if task == "trajectory" or manifest.name == EMBEDDED:
        return load(task, SPLIT, seed, count).samples
    first = FIRST_SCREEN * (1 + seed)
    prompts = drawn_prompts(count, manifest.image.max_pixels, first)
    return [_sample(f"desktop-{first + number}", prompt) for number, prompt in enumerate(prompts)]


def _sample(name: str, prompt: GuiPrompt) -> Sample:
    assert prompt.box is not None  # of a drawn prompt
    return single_click(name, "desktop", png_bytes(prompt.image), prompt.instruction, prompt.box)
