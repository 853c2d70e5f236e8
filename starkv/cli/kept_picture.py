# SPDX-License-Identifier: Apache-2.0
"""The picture of ``starkv inspect --kept``: screenshots with their dropped tokens veiled, and the scores.

Everything is placed in inches, because every part of the picture has its own height.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from starkv.cli.kept_scores import acting_stages, draw_scores, draw_stage, height_of_scores, stage_label
from starkv.cli.kept_style import CAPTION, DOTS_PER_INCH, INK, MARGIN, MARK, MUTED, Sheet, style

if TYPE_CHECKING:
    from starkv.cli.kept import Inspection

Floats = NDArray[np.float32]
_Veil = tuple[int, int, int]

_HEADER, _LEGEND, _GAP = 0.92, 0.22, 0.3
_WIDEST, _NARROWEST, _SMALLEST = 9.2, 6.6, 1.1
"""Inches between the margins, at most and at least, and of a small picture."""
_BETWEEN = 0.3
"""Inches between a screenshot and the small pictures beside it."""
_GROWN = 1.4
"""How much larger a screenshot may be that has nothing beside it."""
_LABEL, _SPACE = 0.19, 0.13
"""Inches above and between small pictures."""
_VEILS: tuple[_Veil, _Veil] = ((38, 49, 62), (206, 213, 220))
"""Over light and over dark screenshots: what is veiled must differ from what is dark by itself."""
_DARK = 100
"""Mean brightness of a dark screenshot, of 255."""
_GHOST, _STRENGTH, _SWELL = 0.15, 0.94, 1.6
"""How much of a veiled pixel's own brightness shows, how dense a veil is, how fast it thins."""


@dataclass(frozen=True)
class _Row:
    """Sizes of one screenshot and of the small pictures that belong to it, in inches."""

    width: float
    height: float
    small: float = 0.0
    """Width of a small picture."""
    across: int = 0
    """Small pictures in a line; 0: there are none."""
    lines: int = 0
    below: bool = False
    """Whether they are below the screenshot rather than beside it."""

    @property
    def small_height(self) -> float:
        return self.small * self.height / self.width

    @property
    def total_width(self) -> float:
        beside = self.across * (self.small + _SPACE) - _SPACE
        if not self.across:
            return self.width
        return max(self.width, beside) if self.below else self.width + _BETWEEN + beside

    @property
    def total_height(self) -> float:
        return self.height + self.below * self.lines * (self.small_height + _LABEL + _SPACE)

    def corner(self, position: int) -> tuple[float, float]:
        """Left upper corner of a small picture, from that of the screenshot."""
        line, column = divmod(position, self.across)
        left = column * (self.small + _SPACE) + (0.0 if self.below else self.width + _BETWEEN)
        down = self.height + _SPACE if self.below else 0.0
        return left, down + line * (self.small_height + _LABEL + _SPACE) + _LABEL


def draw_kept(seen: "Inspection") -> Image.Image:
    """Draw what a compression kept."""
    from matplotlib import rc_context

    kept = seen.kept
    pictures = len(kept.layers) if len(kept.layers) > 1 else len(acting_stages(kept))
    highest = {1: 3.7, 2: 3.35}.get(len(seen.images), 2.7)
    rows = [_arrange(columns / rows, pictures, highest) for rows, columns in kept.prompt.grids]
    inner = max(_NARROWEST, *(row.total_width for row in rows))
    height = _HEADER + sum(CAPTION + row.total_height + _GAP for row in rows) + _LEGEND
    dark = bool(np.mean([np.asarray(image.convert("L")).mean() for image in seen.images]) < _DARK)
    with rc_context(style()), warnings.catch_warnings():
        # A prompt may hold letters that no installed font has: boxes are drawn for them.
        warnings.filterwarnings("ignore", message="Glyph")
        sheet = Sheet(inner + 2 * MARGIN, height + height_of_scores(kept))
        sheet.text(MARGIN, 0.42, seen.title, size=15, weight="bold")
        sheet.text(MARGIN, 0.67, "   ·   ".join(seen.facts), size=9, color=MUTED)
        top = _HEADER
        for index, row in enumerate(rows):
            _screenshot(sheet, seen, index, top, row, _VEILS[dark])
            top += CAPTION + row.total_height + _GAP
        _legend(sheet, seen, top - _GAP + 0.1, _VEILS[dark])
        draw_scores(sheet, kept, height)
        return sheet.image()


def _arrange(aspect: float, pictures: int, highest: float) -> _Row:
    """A large screenshot with small pictures of the same shape: beside it, or below it where they would be
    too small.

    Args:
        aspect: width over height.
        pictures: number of small pictures.
        highest: inches of the screenshot.
    """
    height = min(highest, _WIDEST / aspect)
    alone = _Row(height * aspect, height)
    if not pictures:
        return alone
    fitting = []
    for height in np.linspace(0.3, highest, 60).tolist():
        for lines in range(1, pictures + 1):
            small = ((height + _SPACE) / lines - _SPACE - _LABEL) * aspect
            row = _Row(height * aspect, height, small, -(-pictures // lines), lines)
            if row.total_width <= _WIDEST:
                fitting.append(row)
    best = max(fitting, key=lambda row: (round(min(row.small, row.width / 2), 2), row.height), default=alone)
    if best.small >= _SMALLEST * min(1.0, aspect):
        return best
    across = min(pictures, max(1, int((_WIDEST + _SPACE) / (_SMALLEST * min(1.0, aspect) + _SPACE))))
    # Even lines: 28 layers are four of seven, not three of eight and one of four.
    lines = -(-pictures // across)
    across = -(-pictures // lines)
    height = min(_GROWN * highest, _WIDEST / aspect)
    return _Row(height * aspect, height, (_WIDEST + _SPACE) / across - _SPACE, across, lines, below=True)


def _screenshot(sheet: Sheet, seen: "Inspection", index: int, top: float, row: _Row, veil: _Veil) -> None:
    kept, image = seen.kept, seen.images[index]
    shares = kept.screenshot(index, kept.share)
    down, across = kept.prompt.grids[index]
    name = f"Screenshot {index + 1}" if len(seen.images) > 1 else "Screenshot"
    mean = float(shares.sum(axis=(1, 2)).mean())
    share = f"{100 * mean / (down * across):.0f} %"
    sheet.heading(MARGIN, top + 0.2, name, f"{_count(mean)} of {across}×{down} tokens kept, {share}")
    top += CAPTION
    axes = sheet.picture(MARGIN, top, row.width, row.height)
    _show(axes, image, shares.mean(axis=0), row.width, veil)
    if index == len(seen.images) - 1:
        _mark_clicks(axes, seen, image)
    stages = acting_stages(kept)
    one = len(kept.layers) == 1
    for position in range(len(stages) if one else len(kept.layers)):
        right, below = row.corner(position)
        left, upper = MARGIN + right, top + below
        small = sheet.picture(left, upper, row.small, row.small_height)
        if one:
            label, count = stage_label(stages[position]), ""
            draw_stage(small, kept, index, stages[position])
        else:
            number = kept.layers[position]
            label = f"layer {number}" if row.small > 0.85 else str(number)
            count = _count(float(shares[position].sum()))
            _show(small, image, shares[position], row.small, veil)
        sheet.text(left, upper - 0.055, label, size=7.5, color=INK)
        sheet.text(left + row.small, upper - 0.055, count, size=7.5, color=MUTED, ha="right")


def _count(tokens: float) -> str:
    """Tokens, which may be a mean over heads."""
    return f"{tokens:.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _show(axes: Any, image: Image.Image, share: Floats, width: float, veil: _Veil) -> None:
    """Draw a screenshot in units of its tokens, those with a low share veiled."""
    rows, columns = share.shape
    # A whole number of pixels per token, so that veils end where tokens end.
    step = max(1, round(width * DOTS_PER_INCH / columns))
    pixels = np.asarray(image.resize((columns * step, rows * step), Image.Resampling.LANCZOS))
    shown = veiled(pixels, np.kron(share, np.ones((step, step), np.float32)), veil)
    axes.imshow(shown, extent=(0, columns, rows, 0), aspect="auto")


def veiled(pixels: NDArray[np.uint8], share: Floats, veil: _Veil) -> NDArray[np.uint8]:
    """Veil pixels by how few layers kept them.

    Args:
        pixels: ``[H, W, 3]``.
        share: ``[H, W]``: 1 leaves a pixel as it is.
        veil: colour that takes the place of the others.
    """
    grey = pixels @ np.array((0.299, 0.587, 0.114))
    ghost = _GHOST * grey[..., None] + (1.0 - _GHOST) * np.array(veil)
    strength = (_STRENGTH * (1.0 - share) ** _SWELL)[..., None]
    mixed: NDArray[np.uint8] = np.round(pixels * (1.0 - strength) + ghost * strength).astype(np.uint8)
    return mixed


def _mark_clicks(axes: Any, seen: "Inspection", image: Image.Image) -> None:
    """A ring where the reply's actions are."""
    rows, columns = seen.kept.prompt.grids[-1]
    for action in seen.actions:
        for name in ("screen_xy", "screen_end_xy"):
            point = action.get(name)
            if isinstance(point, list):
                x, y = float(point[0]) / image.width * columns, float(point[1]) / image.height * rows
                for color, width in (("white", 4.0), (MARK, 2.0)):
                    axes.plot(x, y, "o", ms=24, mfc="none", mec=color, mew=width, clip_on=False)


def _legend(sheet: Sheet, seen: "Inspection", top: float, veil: _Veil) -> None:
    """What the veil means."""
    steps = min(seen.kept.mask.shape[0] * seen.kept.mask.shape[1], 28) + 1
    left = sheet.text(MARGIN, top + 0.11, "dropped", size=8, color=MUTED) + 0.08
    axes = sheet.picture(left, top, 1.1, 0.13)
    # Veils are told apart on what they are made for.
    paper = np.full((1, steps, 3), 252 if veil == _VEILS[0] else 20, np.uint8)
    axes.imshow(veiled(paper, np.linspace(0, 1, steps, dtype=np.float32)[None], veil), aspect="auto")
    sheet.text(left + 1.18, top + 0.11, seen.kept_by, size=8, color=MUTED)
