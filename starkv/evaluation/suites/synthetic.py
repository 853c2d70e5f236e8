# SPDX-License-Identifier: Apache-2.0
"""Drawn screens: single clicks, and clicks that need what was seen on earlier screenshots.

No folder is read: split, seed and number say which samples these are, on any machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from PIL import Image

from starkv.errors import UsageError
from starkv.evaluation.answers import Answer
from starkv.evaluation.boxes import Box
from starkv.evaluation.graders.point import CLICK_IN_BOX, click_in_box
from starkv.evaluation.metrics import Metric, share, shares_by
from starkv.evaluation.records import Record
from starkv.evaluation.samples import Loaded, Sample
from starkv.evaluation.suites.base import Suite
from starkv.evaluation.suites.registry import SYNTHETIC_NAME
from starkv.runtime.preprocess.image import png_bytes
from starkv.synthetic import suite as drawn
from starkv.synthetic.samples import Sample as DrawnSample

Task = Literal["click", "trajectory"]
TASKS: tuple[Task, ...] = ("click", "trajectory")


def parse_task(name: str) -> Task:
    """Check a task's name.

    Raises:
        UsageError: no such task.
    """
    for task in TASKS:
        if name == task:
            return task
    raise UsageError(f"unknown task {name!r}; known: {', '.join(TASKS)}")


def parse_split(name: str) -> str:
    """Check a split's name.

    Raises:
        UsageError: no such split.
    """
    if name not in drawn.SPLITS:
        raise UsageError(f"unknown split {name!r}; known: {', '.join(drawn.SPLITS)}")
    return name


def load(task: Task, split: str, seed: int, count: int) -> Loaded:
    """Draw samples; the first ones are the same whatever their number.

    Args:
        task: single clicks or trajectories.
        split: one of the generator's.
        seed: of the drawing.
        count: how many.
    """
    draw = drawn.click_samples if task == "click" else drawn.trajectory_samples
    loaded = Loaded()
    fingerprint = hashlib.sha256()
    for number, sample in enumerate(draw(split, seed, count)):
        if not number:
            # Of the first one only: a longer run must find the records of a shorter one.
            fingerprint.update(repr((sample.id, sample.question, sample.answer, sample.box)).encode())
            fingerprint.update(b"".join(frame.tobytes() for frame in sample.frames))
        loaded.samples.append(sample_of(sample, remembers=task == "trajectory"))
    loaded.identity = f"{task}, {split}, seed {seed}, {fingerprint.hexdigest()[:12]}"
    return loaded


def sample_of(sample: DrawnSample, remembers: bool) -> Sample:
    """A drawn sample as the runner asks it.

    Args:
        sample: frames as arrays; they are kept as PNG, which takes a fraction of the memory.
        remembers: whether compression remembers the earlier samples of its group.
    """
    *earlier, shown = (png_bytes(Image.fromarray(frame)) for frame in sample.frames)
    asked = single_click(sample.id, sample.task, shown, sample.question, sample.box)
    return replace(asked, group=sample.group if remembers else sample.id, earlier=tuple(earlier))


def single_click(
    name: str, kind: str, image: bytes, instruction: str, target: tuple[int, int, int, int]
) -> Sample:
    """A question that a click inside a box answers, and that stands alone.

    Args:
        name: unique among the samples.
        kind: of question, by which figures are broken down.
        image: the screenshot, as the bytes of a file.
        instruction: what to do.
        target: x0, y0, x1, y1 in pixels; right and lower edge don't belong to the box.
    """
    box = Box(*map(float, target))
    return Sample(name, name, image, instruction, {"task": kind}, partial(_grade, box=box), target=box)


def summarise(records: Sequence[Record]) -> list[Metric]:
    """Accuracy on all samples, then by task."""
    return [share("all samples", CLICK_IN_BOX, records), *shares_by("task", CLICK_IN_BOX, records)]


def _grade(answer: Answer, box: Box) -> dict[str, float]:
    return {CLICK_IN_BOX: click_in_box(answer, box)}


SYNTHETIC = Suite(SYNTHETIC_NAME, summarise, "ui_tars_grounding", 128)
