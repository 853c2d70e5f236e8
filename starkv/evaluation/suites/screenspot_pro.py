# SPDX-License-Identifier: Apache-2.0
"""ScreenSpot-Pro: one click on large screens of professional software.

``annotations/*.json``, each a list of ``{"id", "img_filename", "bbox": [left, top, right, bottom],
"img_size": [width, height], "instruction", "platform", "application", "group", "ui_type": "text" | "icon"}``,
and the images in ``images/``.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from starkv.evaluation.answers import Answer
from starkv.evaluation.boxes import Box
from starkv.evaluation.files import Entry, find_image, read_entries
from starkv.evaluation.graders.point import POINT_IN_BOX, point_in_box
from starkv.evaluation.metrics import Metric, share, values_of
from starkv.evaluation.records import Record
from starkv.evaluation.samples import Level, Loaded, Problem, Sample
from starkv.evaluation.suites.base import LayoutError, PublicSuite, checked_directory
from starkv.runtime.actions.coordinates import Size

NAME = "screenspot-pro"
FACETS = ("group", "application", "platform")
_EXPECTED = "annotations/*.json and images/"


class _Entry(Entry):
    id: str = Field(min_length=1)
    img_filename: str = Field(min_length=1)
    bbox: tuple[float, float, float, float]
    img_size: tuple[int, int]
    instruction: str = Field(min_length=1)
    platform: str
    application: str
    group: str
    ui_type: Literal["text", "icon"]

    @field_validator("bbox")
    @classmethod
    def _box(cls, value: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        Box.from_xyxy(value)
        return value


def load(directory: Path, level: Level) -> Loaded:
    """Read the folder.

    Args:
        directory: laid out as above.
        level: of no meaning here.

    Raises:
        UsageError: the layout is wrong, or a file is no list.
    """
    checked_directory(directory, NAME, _EXPECTED)
    paths = sorted((directory / "annotations").glob("*.json"))
    images, loaded, seen = directory / "images", Loaded(), set[str]()
    if not paths or not images.is_dir():
        raise LayoutError(directory, NAME, _EXPECTED)
    for path in paths:
        for where, entry in read_entries(path, _Entry, loaded):
            image = find_image(entry.img_filename, [images])
            if entry.id in seen:
                image = f"the id {entry.id!r} occurred before"
            if isinstance(image, str):
                loaded.problems.append(Problem(path.name, where, image))
                continue
            seen.add(entry.id)
            facets = {name: getattr(entry, name) for name in FACETS} | {"type": entry.ui_type}
            grade = partial(_grade, box=Box.from_xyxy(entry.bbox))
            size = Size(*entry.img_size)
            loaded.samples.append(
                Sample(entry.id, entry.id, image, entry.instruction, facets, grade, image_size=size)
            )
    return loaded


def _grade(answer: Answer, box: Box) -> dict[str, float]:
    return {POINT_IN_BOX: point_in_box(answer, box)}


def summarise(records: Sequence[Record]) -> list[Metric]:
    """Accuracy on all samples, on texts and on icons; the same by group, application and platform."""
    metrics = _accuracies("", records)
    for facet in FACETS:
        for value in values_of(facet, records):
            metrics += _accuracies(f"{facet} {value}: ", records, **{facet: value})
    return metrics


def _accuracies(prefix: str, records: Sequence[Record], **facets: str) -> list[Metric]:
    action = share(f"{prefix}action_acc", POINT_IN_BOX, records, **facets)
    kinds = [
        share(f"{prefix}{kind}_acc", POINT_IN_BOX, records, **{**facets, "type": kind})
        for kind in ("text", "icon")
    ]
    return [action, *(metric for metric in kinds if metric.count)]


SCREENSPOT_PRO = PublicSuite(NAME, summarise, "ui_tars_grounding", 400, load)
