# SPDX-License-Identifier: Apache-2.0
"""Screens drawn from a seed: a desktop with windows, menus, tool bars, forms and lists.

Everything comes from the generator that is passed in, and Pillow's own font is used, so a seed draws the same
screen wherever the same Pillow is installed.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from starkv.synthetic.widgets import COLORS, SHAPES, THEMES, WORDS, Box, Color, Theme

_SENTENCES = (
    "Quarterly report, draft 3",
    "3 unread messages",
    "Last saved 10:42",
    "Settings / Display",
    "invoice_2026-04.pdf",
    "192.168.0.14",
    "Total: 1,284.50",
    "Meeting at 15:00",
)


_GREY = Theme((0, 110, 120), (200, 200, 195), (0, 0, 110), (215, 215, 210), (0, 0, 0), (90, 90, 90))
"""With buttons that stand out from the panel."""
_THEMES = (THEMES[0], THEMES[1], _GREY, THEMES[3])


@dataclass(frozen=True)
class Target:
    """Something that can be clicked."""

    phrase: str
    """How an instruction names it, such as ``the red star``."""
    box: Box

    @property
    def center(self) -> tuple[int, int]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) // 2, (y0 + y1) // 2


@dataclass
class Screen:
    """An RGB image and what can be clicked on it; no two targets have the same name."""

    image: Image.Image
    targets: list[Target] = field(default_factory=list)


class _Painter:
    def __init__(self, random: np.random.Generator, width: int, height: int) -> None:
        self.random = random
        self.theme = _THEMES[random.integers(len(_THEMES))]
        self.screen = Screen(Image.new("RGB", (width, height), self.theme.desktop))
        self.draw = ImageDraw.Draw(self.screen.image)
        self.font_size = int(random.integers(10, 14))
        self.unit = self.font_size + 8
        """Height of a line of widgets."""
        icons = [(color, shape) for color in COLORS for shape in SHAPES]
        self.icons = [icons[index] for index in random.permutation(len(icons))]
        self.words = [WORDS[index] for index in random.permutation(len(WORDS))]

    def text(self, x: int, y: int, words: str, color: Color | None = None, middle: bool = False) -> int:
        """Write at the left middle of (x, y), or around it; returns the width."""
        font = _font(self.font_size)
        self.draw.text(
            (x, y), words, fill=color or self.theme.text, font=font, anchor="mm" if middle else "lm"
        )
        return math.ceil(font.getlength(words))

    def button(self, x: int, y: int, right: int) -> int:
        """A button with a word at (x, y), if it ends before ``right``; returns where it ends."""
        if not self.words:
            return right
        width = math.ceil(_font(self.font_size).getlength(self.words[-1])) + self.unit
        box = (x, y, x + width, y + self.unit)
        if box[2] > right:
            return right
        word = self.words.pop()
        self.draw.rounded_rectangle(box, 3, fill=self.theme.button, outline=self.theme.border)
        self.text((box[0] + box[2]) // 2, (box[1] + box[3]) // 2, word, middle=True)
        self.screen.targets.append(Target(f"'{word}'", box))
        return box[2]

    def icon(self, x: int, y: int, right: int) -> int:
        """A coloured shape at (x, y), if it ends before ``right``; returns where it ends."""
        size = int(self.random.integers(self.unit - 4, self.unit + 1))
        if x + size > right or not self.icons:
            return right
        color, shape = self.icons.pop()
        box = (x, y, x + size, y + size)
        _draw_shape(self.draw, shape, box, COLORS[color], self.theme.button)
        self.screen.targets.append(Target(f"the {color} {shape}", box))
        return box[2]

    def window(self, box: Box) -> None:
        """A window with rows of widgets."""
        x0, y0, x1, y1 = box
        theme, unit = self.theme, self.unit
        self.draw.rectangle((x0 + 3, y0 + 3, x1 + 3, y1 + 3), fill=theme.border)
        self.draw.rectangle(box, fill=theme.panel, outline=theme.border)
        self.draw.rectangle((x0, y0, x1, y0 + unit), fill=theme.title_bar)
        self.text(x0 + 6, y0 + unit // 2, str(self.random.choice(_SENTENCES)), (255, 255, 255))
        y = y0 + unit + 6
        while y + unit + 6 < y1:
            self.row(x0 + 8, y, x1 - 8)
            y += unit + int(self.random.integers(6, 6 + unit // 2))

    def row(self, x: int, y: int, right: int) -> None:
        """One line: buttons, icons, a field with its label and a button, or text."""
        kind = self.random.choice(["buttons", "icons", "field", "text"], p=[0.35, 0.35, 0.15, 0.15])
        if kind == "text":
            self.text(x, y + self.unit // 2, str(self.random.choice(_SENTENCES)))
            return
        if kind == "field":
            x += self.text(x, y + self.unit // 2, str(self.random.choice(["Name", "Path", "Host"]))) + 6
            end = x + (right - x) // 2
            self.draw.rectangle((x, y, end, y + self.unit), fill=(255, 255, 255), outline=self.theme.border)
            self.button(end + 8, y, right)
            return
        add = self.button if kind == "buttons" else self.icon
        while x < right:
            x = add(x, y, right) + int(self.random.integers(8, 8 + self.unit))


def draw_screen(random: np.random.Generator, width: int, height: int) -> Screen:
    """A screen of one or two windows; it has at least one target."""
    painter = _Painter(random, width, height)
    margin = 6
    if width > 1.3 * height and width >= 400:
        split = int(width * random.uniform(0.35, 0.65))
        areas = [(0, 0, split, height), (split, 0, width, height)]
    else:
        areas = [(0, 0, width, height)]
    bar = height - painter.unit - 4
    for x0, y0, x1, _ in areas:
        top = y0 + margin + int(random.integers(0, max(1, height // 10)))
        painter.window((x0 + margin, top, x1 - margin - 3, bar - margin))
    painter.draw.rectangle((0, bar, width, height), fill=painter.theme.title_bar)
    x = 4
    for _ in range(3):
        x = painter.icon(x, bar + 2, width) + 10
    return painter.screen


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: Box, color: Color, ground: Color) -> None:
    x0, y0, x1, y1 = box[0] + 1, box[1] + 1, box[2] - 2, box[3] - 2
    middle_x, middle_y, radius = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    if shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=color)
    elif shape == "ring":
        draw.ellipse((x0, y0, x1, y1), outline=color, width=max(2, round(radius / 3)))
    elif shape == "square":
        draw.rectangle((x0, y0, x1, y1), fill=color)
    elif shape == "plus":
        third = (x1 - x0) / 3
        draw.rectangle((x0 + third, y0, x1 - third, y1), fill=color)
        draw.rectangle((x0, y0 + third, x1, y1 - third), fill=color)
    else:
        draw.polygon(_corners(shape, middle_x, middle_y, radius), fill=color)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "arrow":
        across = [(-1, -0.4), (0, -0.4), (0, -1), (1, 0), (0, 1), (0, 0.4), (-1, 0.4)]
        return [(x + radius * dx, y + radius * dy) for dx, dy in across]
    count = {"triangle": 3, "diamond": 4, "star": 10}[shape]
    lengths = [radius * (0.45 if shape == "star" and index % 2 else 1) for index in range(count)]
    angles = [2 * math.pi * index / count - math.pi / 2 for index in range(count)]
    return [
        (x + length * math.cos(angle), y + length * math.sin(angle))
        for length, angle in zip(lengths, angles, strict=True)
    ]


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
