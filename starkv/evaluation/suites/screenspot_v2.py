# SPDX-License-Identifier: Apache-2.0
"""ScreenSpot-v2: one click on screens of phones, desktops and the web.

``screenspot_{mobile,desktop,web}_v2.json``, each a list of ``{"img_filename", "bbox": [x, y, width, height],
"instruction", "data_type": "text" | "icon"}``, and the images in ``screenspotv2_image/``.
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
from starkv.evaluation.metrics import Metric, mean_of, share, shares_by
from starkv.evaluation.records import Record
from starkv.evaluation.samples import Level, Loaded, Problem, Sample
from starkv.evaluation.suites.base import LayoutError, PublicSuite, checked_directory

NAME = "screenspot-v2"
PLATFORMS = ("mobile", "desktop", "web")
_FILE, _IMAGES = "screenspot_{}_v2.json", "screenspotv2_image"
_EXPECTED = f"screenspot_mobile_v2.json, screenspot_desktop_v2.json or screenspot_web_v2.json and {_IMAGES}/"


class _Entry(Entry):
    img_filename: str = Field(min_length=1)
    bbox: tuple[float, float, float, float]
    instruction: str = Field(min_length=1)
    data_type: Literal["text", "icon"]

    @field_validator("bbox")
    @classmethod
    def _box(cls, value: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        Box.from_xywh(value)
        return value


def load(directory: Path, level: Level) -> Loaded:
    """Read the folder.

    Args:
        directory: laid out as above; platforms may be missing.
        level: of no meaning here.

    Raises:
        UsageError: the layout is wrong, or a file is no list.
    """
    checked_directory(directory, NAME, _EXPECTED)
    images, loaded = directory / _IMAGES, Loaded()
    paths = {platform: directory / _FILE.format(platform) for platform in PLATFORMS}
    if not images.is_dir() or not any(path.is_file() for path in paths.values()):
        raise LayoutError(directory, NAME, _EXPECTED)
    for platform, path in paths.items():
        if not path.is_file():
            loaded.notes.append(f"{path.name} is missing, so nothing is asked about {platform}")
            continue
        for where, entry in read_entries(path, _Entry, loaded):
            image = find_image(entry.img_filename, [images])
            if isinstance(image, str):
                loaded.problems.append(Problem(path.name, where, image))
                continue
            name = f"{platform}/{where.split()[-1]}"
            facets = {"platform": platform, "type": entry.data_type}
            grade = partial(_grade, box=Box.from_xywh(entry.bbox))
            loaded.samples.append(Sample(name, name, image, entry.instruction, facets, grade))
    return loaded


def _grade(answer: Answer, box: Box) -> dict[str, float]:
    return {POINT_IN_BOX: point_in_box(answer, box)}


def summarise(records: Sequence[Record]) -> list[Metric]:
    """Mean of the accuracy on texts and that on icons, each the mean over the platforms; then the parts."""
    cells = [
        share(f"{platform} {kind}", POINT_IN_BOX, records, platform=platform, type=kind)
        for platform in PLATFORMS
        for kind in ("text", "icon")
    ]
    kinds = [
        mean_of(f"average {kind}", [c for c in cells if c.name.endswith(kind)]) for kind in ("text", "icon")
    ]
    platforms = [
        mean_of(platform, [c for c in cells if c.name.startswith(platform)]) for platform in PLATFORMS
    ]
    return [
        mean_of("overall", kinds),
        *(metric for metric in (*kinds, *platforms) if metric.count),
        share("all samples", POINT_IN_BOX, records),
        *(cell for cell in cells if cell.count),
        *shares_by("type", POINT_IN_BOX, records),
    ]


SCREENSPOT_V2 = PublicSuite(NAME, summarise, "ui_tars_grounding", 200, load)
