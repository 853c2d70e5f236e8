# SPDX-License-Identifier: Apache-2.0
"""What is on a screen: windows and placed widgets, and how a screen of them is rendered."""

from dataclasses import dataclass, field

import numpy as np

from starkv.synthetic.widgets import Box, Canvas, Color, Name, Theme, Widget, draw_pointer, draw_widget, fill

TITLE_HEIGHT = 13
GAP = 5
"""Least distance between two elements in pixels; the pointer's outline fits in between."""
_TITLE_BUTTONS: tuple[Color, ...] = ((220, 60, 60), (230, 190, 60), (70, 180, 80))


@dataclass(frozen=True)
class Window:
    """A window with a title bar."""

    box: Box
    theme: Theme

    @property
    def panel(self) -> Box:
        """Where elements may lie."""
        x0, y0, x1, y1 = self.box
        return x0 + 4, y0 + TITLE_HEIGHT + 3, x1 - 4, y1 - 4


@dataclass(frozen=True)
class Element:
    """A widget in its place."""

    widget: Widget
    x: int
    y: int
    theme: Theme

    @property
    def name(self) -> Name:
        return self.widget.name

    @property
    def box(self) -> Box:
        width, height = self.widget.size
        return self.x, self.y, self.x + width, self.y + height

    @property
    def center(self) -> tuple[int, int]:
        """Where the right click goes, in whole pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) // 2, (y0 + y1) // 2


@dataclass(frozen=True)
class Scene:
    """One state of a screen."""

    height: int
    width: int
    desktop: Color
    windows: tuple[Window, ...]
    elements: tuple[Element, ...] = field(default=())

    def find(self, name: Name) -> Element | None:
        """The element of that name."""
        return next((element for element in self.elements if element.name == name), None)

    def is_free(self, box: Box) -> bool:
        """Whether an element would lie inside a window there, with a gap to all others."""
        x0, y0, x1, y1 = box
        inside = any(
            px0 + 2 <= x0 and py0 + 2 <= y0 and x1 <= px1 - 2 and y1 <= py1 - 2
            for px0, py0, px1, py1 in (window.panel for window in self.windows)
        )
        return inside and all(
            x0 > ox1 + GAP or x1 < ox0 - GAP or y0 > oy1 + GAP or y1 < oy0 - GAP
            for ox0, oy0, ox1, oy1 in (other.box for other in self.elements)
        )


def find_place(scene: Scene, widget: Widget, random: np.random.Generator, tries: int = 30) -> Element | None:
    """``widget`` at a free random place of the scene; None if none was found."""
    width, height = widget.size
    for _ in range(tries):
        window = scene.windows[random.integers(len(scene.windows))]
        x0, y0, x1, y1 = window.panel
        if x1 - x0 < width + 5 or y1 - y0 < height + 5:
            continue
        x = int(random.integers(x0 + 2, x1 - width - 1))
        y = int(random.integers(y0 + 2, y1 - height - 1))
        if scene.is_free((x, y, x + width, y + height)):
            return Element(widget, x, y, window.theme)
    return None


def render(scene: Scene, pointer: Box | None = None) -> Canvas:
    """Draw a scene.

    Args:
        scene: what is on the screen.
        pointer: box of the element that was just clicked.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    canvas: Canvas = np.empty((scene.height, scene.width, 3), np.uint8)
    canvas[:] = scene.desktop
    for window in scene.windows:
        draw_window(canvas, window)
    for element in scene.elements:
        draw_widget(canvas, element.widget, element.x, element.y, element.theme)
    if pointer:
        draw_pointer(canvas, pointer)
    return canvas


def draw_window(canvas: Canvas, window: Window) -> None:
    """Draw an empty window."""
    x0, y0, x1, y1 = window.box
    theme = window.theme
    fill(canvas, window.box, theme.border)
    fill(canvas, (x0 + 1, y0 + 1, x1 - 1, y1 - 1), theme.panel)
    fill(canvas, (x0 + 1, y0 + 1, x1 - 1, y0 + TITLE_HEIGHT), theme.title_bar)
    for index, color in enumerate(_TITLE_BUTTONS):
        fill(canvas, (x1 - 10 - index * 9, y0 + 4, x1 - 5 - index * 9, y0 + 9), color)
