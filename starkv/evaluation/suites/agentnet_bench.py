# SPDX-License-Identifier: Apache-2.0
"""AgentNetBench: every next step of recorded desktop tasks.

``test_data/*.json`` (or ``single_data/``), each a task or a list of them: ``{"task_id",
"high_level_task_description" | "user_task_description", "steps": [{"image", "ground_truth_actions":
[{"type", "params", "metadata"}], "alternative_options", "inner_monologue"}]}``; images are found in
``images/`` beside the tasks, in ``images/`` of the folder, beside the tasks, or in the folder itself.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from starkv.evaluation.answers import Answer
from starkv.evaluation.files import UnreadableFileError, find_image, first_error, read_json
from starkv.evaluation.graders.desktop import LENIENT, STRICT, DesktopAction, grade_step, joined
from starkv.evaluation.metrics import Metric, share, shares_by
from starkv.evaluation.records import Record
from starkv.evaluation.samples import Level, Loaded, PastStep, Problem, Sample
from starkv.evaluation.suites.agentnet_entries import TaskEntry
from starkv.evaluation.suites.base import LayoutError, PublicSuite, checked_directory

NAME = "agentnet-bench"
FOLDERS = ("test_data", "single_data")
_EXPECTED = "test_data/*.json and the images that they name"


def load(directory: Path, level: Level) -> Loaded:
    """Read the folder. A task with anything wrong in it is left out as a whole: each step is asked with the
    ones before it.

    Args:
        directory: laid out as above.
        level: of no meaning here.

    Raises:
        UsageError: the layout is wrong.
    """
    checked_directory(directory, NAME, _EXPECTED)
    loaded, seen = Loaded(), set[str]()
    data = next((directory / name for name in FOLDERS if any((directory / name).glob("*.json"))), None)
    if data is None:
        raise LayoutError(directory, NAME, _EXPECTED)
    paths = sorted(data.glob("*.json"))
    folders = [data / "images", directory / "images", data, directory]
    for path in paths:
        for where, raw in _tasks(path, loaded):
            steps = raw.get("steps") if isinstance(raw, dict) else None
            lost = len(steps) if isinstance(steps, list) and steps else 1
            try:
                task = TaskEntry.model_validate(raw)
            except ValidationError as error:
                loaded.problems.append(Problem(path.name, where, first_error(error), lost))
                continue
            if task.task_id in seen:
                loaded.problems.append(
                    Problem(path.name, where, f"the task_id {task.task_id!r} occurred before", lost)
                )
                continue
            samples = _samples(task, folders)
            if isinstance(samples, str):
                loaded.problems.append(Problem(path.name, where, samples, lost))
                continue
            seen.add(task.task_id)
            loaded.samples += samples
    return loaded


def _tasks(path: Path, loaded: Loaded) -> Iterator[tuple[str, object]]:
    """Tasks of a file with their names in messages; a file that can't be read is a task that is lost."""
    try:
        content = read_json(path, object)
    except UnreadableFileError as error:
        loaded.problems.append(Problem(path.name, "", str(error)))
        return
    loaded.annotations.append(path)
    if isinstance(content, list):
        yield from ((f"task {number}", raw) for number, raw in enumerate(content))
    else:
        yield "the task", content


def _samples(task: TaskEntry, folders: Sequence[Path]) -> list[Sample] | str:
    """Steps of a task, or what is wrong with one of them."""
    samples: list[Sample] = []
    past: list[PastStep] = []
    for number, step in enumerate(task.steps):
        image = find_image(step.image, folders)
        if isinstance(image, str):
            return f"step {number}: {image}"
        options = step.options()
        actions = options[0]
        samples.append(
            Sample(
                f"{task.task_id}/{number}",
                task.task_id,
                image,
                task.instruction,
                {"action": joined(actions)[0].type},
                partial(_grade, options=options),
                tuple(past),
            )
        )
        past.append(PastStep(image, step.inner_monologue.thought, step.inner_monologue.summary, actions))
    return samples


def _grade(answer: Answer, options: Sequence[Sequence[DesktopAction]]) -> dict[str, float]:
    return grade_step(answer, options)


def summarise(records: Sequence[Record]) -> list[Metric]:
    """Mean grade of all steps by both rules, then by type of the step's first action."""
    return [
        share("step accuracy", LENIENT, records),
        share("step accuracy", STRICT, records),
        *shares_by("action", LENIENT, records),
        *shares_by("action", STRICT, records),
    ]


AGENTNET_BENCH = PublicSuite(NAME, summarise, "ui_tars_computer", 1000, load)
