# SPDX-License-Identifier: Apache-2.0
"""Widgets of synthetic screens: their names, their sizes, and how they are drawn.

Everything is drawn with numpy from masks that are rendered once: a screen costs milliseconds. Pillow's
built-in bitmap font is used, never a system font, so a widget looks the same on every machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; the right and bottom edge are exclusive."""
Color = tuple[int, int, int]
Canvas = NDArray[np.uint8]
"""RGB image ``[H, W, 3]``."""
Kind = Literal["icon", "button", "check", "menu", "field"]

_WORD_LIST = """
Save Open Close Copy Paste Cut Undo Redo Find Help Print Edit View File Home Back Next Stop Play
Send Mail Chat Call User Lock Menu Zoom Sort Tags Mute Sync Login Exit Apply Reset Cancel OK Yes No
Search
"""
WORDS = tuple(_WORD_LIST.split())
COLORS: Mapping[str, Color] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 90, 230),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (40, 200, 210),
    "black": (25, 25, 25),
}
COLOR_NAMES = tuple(COLORS)
SHAPES = ("circle", "square", "triangle", "star", "plus", "diamond", "ring", "arrow")
ICON_SIZES = range(14, 23)
POINTER_COLOR: Color = (255, 0, 200)
FIELD_WIDTHS = (40, 80)
"""Narrowest and widest box of a text field."""


@dataclass(frozen=True)
class Theme:
    """Colours of a window and its widgets."""

    desktop: Color
    panel: Color
    title_bar: Color
    button: Color
    text: Color
    border: Color


THEMES = (
    Theme((200, 205, 215), (245, 245, 245), (70, 110, 180), (225, 225, 230), (20, 20, 20), (130, 130, 140)),
    Theme((40, 44, 52), (70, 75, 85), (25, 27, 32), (100, 105, 120), (240, 240, 240), (20, 20, 20)),
    Theme((0, 110, 120), (200, 200, 195), (0, 0, 110), (200, 200, 195), (0, 0, 0), (90, 90, 90)),
    Theme((240, 230, 210), (255, 250, 240), (190, 120, 60), (250, 225, 180), (70, 40, 10), (160, 120, 80)),
    Theme((180, 215, 190), (235, 250, 240), (60, 140, 90), (255, 255, 255), (20, 60, 30), (90, 150, 110)),
)


@dataclass(frozen=True)
class Name:
    """What an element is called: no two of a screen share a name."""

    color: int = -1
    shape: int = -1
    word: int = -1

    @property
    def is_icon(self) -> bool:
        return self.word < 0

    def __str__(self) -> str:
        if self.is_icon:
            return f"the {COLOR_NAMES[self.color]} {SHAPES[self.shape]}"
        return f"'{WORDS[self.word]}'"


@dataclass(frozen=True)
class Widget:
    """An element without a place."""

    kind: Kind
    name: Name
    icon_size: int = 0
    padding: int = 0
    """Button: between its word and its edge. Field: width of its box."""
    decorated: bool = False
    """Icon: drawn on a button. Check box: checked."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        if self.kind == "icon":
            return self.icon_size + 6, self.icon_size + 6
        height, width = WORD_MASKS[self.name.word].shape
        if self.kind == "button":
            return width + 2 * self.padding, height + 5
        if self.kind == "menu":
            return width + 8, height + 4
        if self.kind == "field":
            return width + 5 + self.padding, height + 5
        return width + 16, max(height, 12)


def _word_mask(word: str) -> NDArray[np.bool_]:
    font = ImageFont.load_default_imagefont()
    _, _, right, bottom = font.getbbox(word)
    image = Image.new("L", (int(right) + 1, int(bottom) + 1), 0)
    ImageDraw.Draw(image).text((0, 0), word, font=font, fill=255)
    mask = np.asarray(image) > 127
    columns = np.where(mask)[1]
    # The full line height stays, so that all words share one baseline.
    return mask[:, columns.min() : columns.max() + 1]


def _icon_mask(shape: str, size: int) -> NDArray[np.bool_]:
    scale = size * 4  # drawn large, then averaged down: cheap anti-aliasing before the threshold
    image = Image.new("L", (scale, scale), 0)
    draw, last, half = ImageDraw.Draw(image), scale - 1, scale / 2
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, last, last), fill=255)
    if shape == "ring":
        draw.ellipse((scale * 0.28, scale * 0.28, scale * 0.72, scale * 0.72), fill=0)
    elif shape == "square":
        draw.rectangle((scale * 0.06, scale * 0.06, last - scale * 0.06, last - scale * 0.06), fill=255)
    elif shape == "triangle":
        draw.polygon([(half, 0), (last, last), (0, last)], fill=255)
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, half, scale * 0.2)
        points = zip(half + radii * np.sin(angles), half - radii * np.cos(angles), strict=True)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    elif shape == "plus":
        draw.rectangle((scale * 0.35, 0, scale * 0.65, last), fill=255)
        draw.rectangle((0, scale * 0.35, last, scale * 0.65), fill=255)
    elif shape == "diamond":
        draw.polygon([(half, 0), (last, half), (half, last), (0, half)], fill=255)
    elif shape == "arrow":
        draw.polygon([(last, half), (scale * 0.45, 0), (scale * 0.45, last)], fill=255)
        draw.rectangle((0, scale * 0.36, half, scale * 0.64), fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)) > 110


WORD_MASKS = tuple(_word_mask(word) for word in WORDS)
ICON_MASKS = {
    (index, size): _icon_mask(name, size) for index, name in enumerate(SHAPES) for size in ICON_SIZES
}


def fill(canvas: Canvas, box: Box, color: Color) -> None:
    """A filled rectangle; what lies outside of the canvas is cut off."""
    x0, y0, x1, y1 = box
    canvas[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = color


def stamp(canvas: Canvas, mask: NDArray[np.bool_], x: int, y: int, color: Color) -> None:
    """Colour the pixels of a mask whose upper left corner is at a place, wholly on the canvas."""
    canvas[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = color


def framed(canvas: Canvas, box: Box, border: Color, inside: Color) -> None:
    """A filled rectangle with a border of one pixel."""
    x0, y0, x1, y1 = box
    fill(canvas, box, border)
    fill(canvas, (x0 + 1, y0 + 1, x1 - 1, y1 - 1), inside)


def draw_widget(canvas: Canvas, widget: Widget, x: int, y: int, theme: Theme) -> None:
    """Draw a widget with its upper left corner at a place, wholly on the canvas."""
    width, height = widget.size
    box = (x, y, x + width, y + height)
    name = widget.name
    if widget.kind == "button" or (widget.kind == "icon" and widget.decorated):
        framed(canvas, box, theme.border, theme.button)
    if widget.kind == "icon":
        mask = ICON_MASKS[name.shape, widget.icon_size]
        stamp(canvas, mask, x + 3, y + 3, COLORS[COLOR_NAMES[name.color]])
        return
    mask = WORD_MASKS[name.word]
    if widget.kind == "button":
        stamp(canvas, mask, x + widget.padding, y + 3, theme.text)
    elif widget.kind == "menu":
        stamp(canvas, mask, x + 4, y + 2, theme.text)
    elif widget.kind == "field":
        stamp(canvas, mask, x, y + 3, theme.text)
        framed(canvas, (box[2] - widget.padding, y, box[2], box[3]), theme.border, (255, 255, 255))
    else:
        framed(canvas, (x, y, x + 11, y + 11), theme.border, (255, 255, 255))
        if widget.decorated:
            fill(canvas, (x + 3, y + 3, x + 8, y + 8), (30, 90, 200))
        stamp(canvas, mask, x + 15, y, theme.text)


def draw_pointer(canvas: Canvas, box: Box) -> None:
    """A coloured outline around what was clicked, two pixels wide."""
    x0, y0, x1, y1 = box
    for edge in (
        (x0 - 3, y0 - 3, x1 + 3, y0 - 1),
        (x0 - 3, y1 + 1, x1 + 3, y1 + 3),
        (x0 - 3, y0 - 3, x0 - 1, y1 + 3),
        (x1 + 1, y0 - 3, x1 + 3, y1 + 3),
    ):
        fill(canvas, edge, POINTER_COLOR)
