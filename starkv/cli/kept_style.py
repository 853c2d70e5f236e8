# SPDX-License-Identifier: Apache-2.0
"""Colours, letters and a sheet measured in inches for the picture of ``starkv inspect --kept``."""

from typing import Any

import numpy as np
from PIL import Image

INK, MUTED, FAINT = "#1c2733", "#66727f", "#cdd5dc"
PAPER, BAND = "#f6f8fa", "#eef2f6"
BLUE, SKY, ORANGE, GREY = "#0072B2", "#56B4E9", "#E69F00", "#8d99a6"
"""The first three from Okabe and Ito's colours, which colour-blind people can tell apart."""
MARK = "#D81B60"
MARGIN, CAPTION = 0.45, 0.32
"""Inches around the sheet, and of a line of text above a part."""
DOTS_PER_INCH = 144
_LETTERS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC", "SimHei")
"""Fonts for prompts in any language, in this order; those that are not installed are left out."""


def style() -> Any:
    """Settings of matplotlib."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return {
        "font.family": [name for name in _LETTERS if name in installed] or ["sans-serif"],
        "font.size": 8.5,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }


class Sheet:
    """A figure whose parts are placed in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
        self._canvas: Any = FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes with this corner and size."""
        bottom = self.height - top - height
        place = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def picture(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes with a thin frame and nothing else."""
        axes = self.axes(left, top, width, height)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=True, color=FAINT, linewidth=0.7)
        return axes

    def text(self, left: float, baseline: float, text: str, **options: Any) -> float:
        """Write text, as it is, on a baseline; returns where it ends."""
        place = (left / self.width, 1.0 - baseline / self.height)
        drawn = self.figure.text(*place, text, va="baseline", parse_math=False, **options)
        return float(drawn.get_window_extent(self._canvas.get_renderer()).x1) / DOTS_PER_INCH

    def heading(self, left: float, top: float, title: str, facts: str) -> None:
        """A title and, more quietly, facts behind it."""
        end = self.text(left, top, title, size=9.5, weight="bold")
        self.text(end + 0.12, top, facts, size=8.5, color=MUTED)

    def image(self) -> Image.Image:
        """The drawn sheet."""
        self._canvas.draw()
        return Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
