# SPDX-License-Identifier: Apache-2.0
"""Samples in the form of ``starkv.synthetic.suite``, on screens that the embedded model was tested on."""

from collections.abc import Iterator

import numpy as np
import pytest

from starkv.calibration.held_out import held_out_prompts
from starkv.export.cards import resolve_model
from starkv.synthetic.samples import Evidence, Sample

FRAMES = 3
EPISODE = 2


def click_samples(split: str, seed: int, count: int) -> Iterator[Sample]:
    """One question for each screen; a seed begins at another screen."""
    first = 10 * seed
    prompts = held_out_prompts(resolve_model("gui-tiny"), first + count)[first:]
    for number, prompt in enumerate(prompts):
        assert prompt.box is not None
        yield Sample(
            id=f"{split}-{seed}-{number}",
            task=("icon", "word")[number % 2],
            group=f"{split}-{seed}-{number // 4}",
            frames=(np.asarray(prompt.image),),
            question=prompt.instruction,
            answer=prompt.reply or "",
            box=prompt.box,
            evidence=(Evidence(0, prompt.box),),
        )


def trajectory_samples(split: str, seed: int, count: int) -> Iterator[Sample]:
    """Episodes of two questions about three screenshots each."""
    drawn = list(click_samples(split, seed, count + FRAMES))
    for number in range(count):
        shown = drawn[number : number + FRAMES]
        last = shown[-1]
        yield Sample(
            id=f"{split}-{seed}-{number}",
            task="current",
            group=f"{split}-{seed}-{number // EPISODE}",
            frames=tuple(sample.frames[0] for sample in shown),
            question=last.question,
            answer=last.answer,
            box=last.box,
            evidence=(Evidence(FRAMES - 1, last.box),),
        )


def use_drawn_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``--suite synthetic`` ask these samples."""
    monkeypatch.setattr("starkv.synthetic.suite.click_samples", click_samples)
    monkeypatch.setattr("starkv.synthetic.suite.trajectory_samples", trajectory_samples)
