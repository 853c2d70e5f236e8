# SPDX-License-Identifier: Apache-2.0
"""Pictures of the report on clicks: the screenshot, the right box, and where the model clicked."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from PIL import ImageDraw

from starkv.evaluation.graders.point import CLICK_IN_BOX
from starkv.evaluation.records import Record
from starkv.evaluation.samples import Sample
from starkv.runtime.actions.coordinates import JsonValue
from starkv.runtime.drawing import draw_actions
from starkv.runtime.preprocess.image import load_image

HITS, MISSES = 4, 12
"""Most pictures of each."""
WIDEST = 480
"""Pixels of a picture's longer side."""
_BOX = (0, 158, 115)


@dataclass(frozen=True)
class Picture:
    """One answered question."""

    question: str
    reply: str
    hit: bool
    note: str
    uri: str
    """The picture itself, as a data URI."""


def pictures(samples: Sequence[Sample], records: Sequence[Record]) -> Iterator[Picture]:
    """The first misses, then the first hits.

    Args:
        samples: what was asked.
        records: answers to them, or to some of them.
    """
    by_id = {sample.id: sample for sample in samples}
    for hit, most in ((False, MISSES), (True, HITS)):
        chosen = [record for record in records if (record.grades[CLICK_IN_BOX] == 1.0) == hit]
        for record in chosen[:most]:
            yield _picture(by_id[record.id], record, hit)


def _picture(sample: Sample, record: Record, hit: bool) -> Picture:
    image = load_image(sample.image)
    actions = [cast(Mapping[str, JsonValue], record.action)] if record.action else []
    canvas = draw_actions(image, actions)
    if sample.target:
        left, top, right, bottom = sample.target
        ImageDraw.Draw(canvas).rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=_BOX, width=2)
    canvas.thumbnail((WIDEST, WIDEST))
    stream = io.BytesIO()
    # Screens have few colours: a palette halves the file.
    canvas.quantize(128).save(stream, "PNG", optimize=True)
    notes = [sample.facets.get("task", "")]
    if sample.earlier:
        notes.append(f"last of {len(sample.earlier) + 1} screenshots")
    if record.distance is not None:
        notes.append(f"{record.distance:.0f} px from the middle")
    return Picture(
        sample.instruction,
        record.reply if len(record.reply) <= 160 else record.reply[:159] + "…",
        hit,
        ", ".join(filter(None, notes)),
        "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode(),
    )
