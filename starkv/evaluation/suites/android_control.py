# SPDX-License-Identifier: Apache-2.0
"""AndroidControl: the next step on a phone, in the form of UGround's offline evaluation.

``500_steps.json`` or ``android_control_test.json``, a list of ``{"episode_id", "step_index", "screenshot",
"goal", "step_instruction", "previous_actions", "action": {"action_type", …}, "accessibility_tree": [
{"bbox_pixels": {"x_min", "y_min", "x_max", "y_max"}}]}``; screenshots are found in the folder itself, in
``screenshots/`` or in ``images/``.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from starkv.evaluation.answers import Answer, Place
from starkv.evaluation.boxes import Box
from starkv.evaluation.files import Entry, find_image, read_entries
from starkv.evaluation.graders.phone import (
    LENIENT,
    LENIENT_POINT,
    POINTING,
    STRICT,
    STRICT_POINT,
    PhoneAction,
    grade_step,
)
from starkv.evaluation.metrics import Metric, share, shares_by
from starkv.evaluation.records import Record
from starkv.evaluation.samples import Level, Loaded, Problem, Sample
from starkv.evaluation.suites.base import LayoutError, PublicSuite, checked_directory

NAME = "android-control"
FILES = ("500_steps.json", "android_control_test.json")
_EXPECTED = f"{FILES[0]} or {FILES[1]}, and the screenshots that it names"
_TEXT_OF = {"type_text": "text", "scroll": "direction", "open_app": "app_name", "status": "goal_status"}


class _Action(Entry):
    action_type: Literal[
        "click",
        "long_press",
        "type_text",
        "input_text",
        "scroll",
        "open_app",
        "navigate_back",
        "navigate_home",
        "wait",
        "status",
    ]
    x: float | None = None
    y: float | None = None
    text: str | None = None
    direction: Literal["up", "down", "left", "right"] | None = None
    app_name: str | None = None
    goal_status: str = "successful"

    @property
    def type(self) -> str:
        # The original data set's name of the same action.
        return "type_text" if self.action_type == "input_text" else self.action_type

    @model_validator(mode="after")
    def _complete(self) -> "_Action":
        needed = ("x", "y") if self.type in POINTING else (_TEXT_OF.get(self.type, "type"),)
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{self.action_type} needs {name}")
        return self


class _Bounds(Entry):
    x_min: float
    y_min: float
    x_max: float
    y_max: float


class _Element(Entry):
    bbox_pixels: _Bounds


class _Entry(Entry):
    episode_id: int | str
    step_index: int | str
    screenshot: str = Field(min_length=1)
    goal: str = Field(min_length=1)
    step_instruction: str = ""
    previous_actions: list[str] | str | None = None
    action: _Action
    accessibility_tree: list[_Element] = Field(default_factory=list)


def load(directory: Path, level: Level) -> Loaded:
    """Read the folder.

    Args:
        directory: laid out as above; the file of 500 steps goes first.
        level: whether the model is told the next step in words.

    Raises:
        UsageError: the layout is wrong, or the file is no list.
    """
    checked_directory(directory, NAME, _EXPECTED)
    path = next((directory / name for name in FILES if (directory / name).is_file()), None)
    if path is None:
        raise LayoutError(directory, NAME, _EXPECTED)
    loaded, folders, seen = Loaded(), [directory, directory / "screenshots", directory / "images"], set[str]()
    for where, entry in read_entries(path, _Entry, loaded, "step"):
        name = f"{entry.episode_id}/{entry.step_index}"
        image = find_image(entry.screenshot, folders)
        if name in seen:
            image = f"step {entry.step_index} of episode {entry.episode_id} occurred before"
        elif level == "low" and not entry.step_instruction.strip():
            image = "step_instruction is empty, but --level low asks with it"
        if isinstance(image, str):
            loaded.problems.append(Problem(path.name, where, image))
            continue
        seen.add(name)
        grade = partial(_grade, action=entry.action, elements=_boxes(entry.accessibility_tree))
        # Steps are sampled from episodes and asked one by one: each starts anew.
        loaded.samples.append(
            Sample(name, name, image, _instruction(entry, level), {"action": entry.action.type}, grade)
        )
    return loaded


def _instruction(entry: _Entry, level: Level) -> str:
    earlier = entry.previous_actions or []
    if not isinstance(earlier, str):
        earlier = "\n".join(f"{number}. {text}" for number, text in enumerate(earlier, 1))
    parts = [entry.goal]
    if earlier.strip():
        parts.append(f"Previous actions:\n{earlier}")
    if level == "low":
        parts.append(f"Next step: {entry.step_instruction}")
    return "\n\n".join(parts)


def _boxes(elements: Sequence[_Element]) -> list[Box]:
    bounds = [element.bbox_pixels for element in elements]
    # Trees hold elements that are scrolled out of sight, with boxes turned inside out.
    return [
        Box(b.x_min, b.y_min, b.x_max, b.y_max) for b in bounds if b.x_max > b.x_min and b.y_max > b.y_min
    ]


def _grade(answer: Answer, action: _Action, elements: Sequence[Box]) -> dict[str, float]:
    place = None
    if action.x is not None and action.y is not None and action.type in POINTING:
        place = Place(action.x / answer.screen.width, action.y / answer.screen.height)
    text = getattr(action, _TEXT_OF[action.type]) if action.type in _TEXT_OF else ""
    return grade_step(answer, PhoneAction(action.type, place, text), elements)


def summarise(records: Sequence[Record]) -> list[Metric]:
    """Step accuracy by both rules, accuracy of the place where there is one, both by type of action."""
    return [
        share("step accuracy", LENIENT, records),
        share("step accuracy", STRICT, records),
        share("grounding accuracy", LENIENT_POINT, records),
        share("grounding accuracy", STRICT_POINT, records),
        *shares_by("action", LENIENT, records),
        *shares_by("action", STRICT, records),
    ]


ANDROID_CONTROL = PublicSuite(NAME, summarise, "ui_tars_mobile", 600, load)
