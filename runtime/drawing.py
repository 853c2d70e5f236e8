# SPDX-License-Identifier: Apache-2.0
"""Draw actions onto a screenshot, so that a person sees where the model would click."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw

from starkv.errors import UsageError
from starkv.runtime.actions.coordinates import JsonValue

_MARK = (255, 0, 110)
_HALO = (255, 255, 255)


def draw_actions(image: Image.Image, actions: Iterable[Mapping[str, JsonValue]]) -> Image.Image:
    """A copy of ``image`` with a cross hair at each action's place and a line along each drag.

    Args:
        image: the screenshot.
        actions: the JSON form of actions, see ``actions.coordinates.to_json``.
    """
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    radius = max(6, round(min(canvas.size) * 0.03))
    for action in actions:
        start, end = _point(action.get("screen_xy")), _point(action.get("screen_end_xy"))
        if start and end:
            draw.line([start, end], _HALO, width=radius // 2)
            draw.line([start, end], _MARK, width=radius // 4)
        for point in (start, end):
            if point:
                _cross_hair(draw, *point, radius)
    return canvas


def check_place(path: Path) -> None:
    """Refuse a place where no picture can be written, before the work for it is done.

    Raises:
        UsageError: its folder does not exist, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise UsageError(f"can't write the picture {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UsageError(f"can't write the picture {path}: it is a folder")


def save_png(image: Image.Image, path: Path) -> None:
    """Write ``image`` to ``path``, complete or not at all.

    Raises:
        UsageError: the place can't be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as beside:
            try:
                image.save(beside, "PNG")
                os.chmod(beside.name, 0o644)
                os.replace(beside.name, path)
            except BaseException:
                os.unlink(beside.name)
                raise
    except OSError as error:
        raise UsageError(f"can't write the picture {path}: {error.strerror or error}") from None


def _point(value: JsonValue | None) -> tuple[float, float] | None:
    return (float(value[0]), float(value[1])) if isinstance(value, list) else None


def _cross_hair(draw: ImageDraw.ImageDraw, x: float, y: float, radius: int) -> None:
    width = max(2, radius // 4)
    # The light outline first: the mark must be seen on any background.
    for color, stroke in ((_HALO, width + 2), (_MARK, width)):
        grown = radius + (stroke - width) / 2
        draw.ellipse((x - grown, y - grown, x + grown, y + grown), outline=color, width=stroke)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            inner, outer = radius, radius * 1.8
            draw.line((x + dx * inner, y + dy * inner, x + dx * outer, y + dy * outer), color, stroke)
    draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=_MARK)
