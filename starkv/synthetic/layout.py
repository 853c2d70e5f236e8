# SPDX-License-Identifier: Apache-2.0
"""Random screens: desktops of one to three windows, with rows of widgets or widgets all over the place."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from starkv.synthetic.scene import GAP, Element, Scene, Window, find_place
from starkv.synthetic.widgets import (
    COLOR_NAMES,
    FIELD_WIDTHS,
    ICON_SIZES,
    SHAPES,
    THEMES,
    WORDS,
    Box,
    Kind,
    Name,
    Widget,
)

SMALLEST_WINDOW = 150
"""Pixels per side below which a desktop is not divided any further."""
_WORD_KINDS: tuple[Kind, ...] = ("button", "check", "field")
_KIND_OF_ROW: Mapping[str, Kind] = {"menu": "menu", "button": "button", "check": "check", "field": "field"}
"""Sort of row → the kind of all its words; those of other rows differ."""


class Names:
    """Names in random order, none of them twice."""

    def __init__(self, random: np.random.Generator) -> None:
        self._words = [Name(word=int(index)) for index in random.permutation(len(WORDS))]
        count = len(COLOR_NAMES) * len(SHAPES)
        self._icons = [
            Name(color=int(index) // len(SHAPES), shape=int(index) % len(SHAPES))
            for index in random.permutation(count)
        ]

    def take(self, icon: bool) -> Name | None:
        """The next icon or word, or one of the other sort where those are used up; None if all are."""
        wanted, others = (self._icons, self._words) if icon else (self._words, self._icons)
        return wanted.pop() if wanted else others.pop() if others else None

    def give_back(self, name: Name) -> None:
        """A name that was not used after all: it comes last."""
        (self._icons if name.is_icon else self._words).insert(0, name)


def make_widget(random: np.random.Generator, name: Name, kind: Kind | None = None) -> Widget:
    """A widget of that name with random looks; ``kind`` is for words, random if None."""
    if name.is_icon:
        size = int(random.integers(ICON_SIZES.start, ICON_SIZES.stop))
        return Widget("icon", name, icon_size=size, decorated=bool(random.random() < 0.4))
    kind = kind or _WORD_KINDS[random.choice(3, p=[0.55, 0.25, 0.2])]
    if kind == "button":
        return Widget(kind, name, padding=int(random.integers(4, 11)))
    if kind == "field":
        return Widget(kind, name, padding=int(random.integers(*FIELD_WIDTHS)))
    return Widget(kind, name, decorated=kind == "check" and bool(random.random() < 0.5))


def place_new(random: np.random.Generator, scene: Scene, names: Names) -> Scene:
    """The scene with a new element; the same scene if there is no name or room left."""
    name = names.take(icon=bool(random.random() < 0.5))
    if name is None:
        return scene
    element = find_place(scene, make_widget(random, name), random)
    if element is None:
        names.give_back(name)
        return scene
    return replace(scene, elements=(*scene.elements, element))


def _areas(random: np.random.Generator, height: int, width: int) -> list[Box]:
    """Divide the desktop into one to three areas."""
    areas: list[Box] = [(0, 0, width, height)]
    for _ in range(int(random.integers(0, 3))):
        x0, y0, x1, y1 = areas.pop(0)
        across = x1 - x0 >= y1 - y0
        side = x1 - x0 if across else y1 - y0
        if side < 2 * SMALLEST_WINDOW:
            areas.insert(0, (x0, y0, x1, y1))
            break
        cut = int(random.integers(SMALLEST_WINDOW, side - SMALLEST_WINDOW + 1))
        if across:
            areas += [(x0, y0, x0 + cut, y1), (x0 + cut, y0, x1, y1)]
        else:
            areas += [(x0, y0, x1, y0 + cut), (x0, y0 + cut, x1, y1)]
    return areas


def empty_scene(random: np.random.Generator, height: int, width: int) -> Scene:
    """A desktop with windows and nothing in them."""
    windows = []
    desktop = THEMES[random.integers(len(THEMES))].desktop
    for x0, y0, x1, y1 in _areas(random, height, width):
        left, top, right, bottom = (int(random.integers(0, side // 8)) for side in (x1 - x0, y1 - y0) * 2)
        theme = THEMES[random.integers(len(THEMES))]
        windows.append(Window((x0 + left, y0 + top, x1 - right, y1 - bottom), theme))
    return Scene(height, width, desktop, tuple(windows))


def _row(random: np.random.Generator, window: Window, y: int, widgets: Sequence[Widget]) -> list[Element]:
    """Widgets side by side from the panel's left edge, as many as fit."""
    x0, _, x1, y1 = window.panel
    x = x0 + 3 + int(random.integers(0, 12))
    placed = []
    for widget in widgets:
        width, height = widget.size
        if x + width > x1 - 2 or y + height > y1 - 2:
            break
        placed.append(Element(widget, x, y, window.theme))
        x += width + GAP + 2 + int(random.integers(0, 14))
    return placed


def _rows(random: np.random.Generator, window: Window, names: Names, most: int) -> list[Element]:
    """A window of rows: a menu bar, a tool bar of icons, then buttons, check boxes, fields and icons."""
    _, y, _, bottom = window.panel
    y += 3
    placed: list[Element] = []
    kinds = ["menu"] * bool(random.random() < 0.6) + ["tools"] * bool(random.random() < 0.6)
    while y < bottom - 20 and len(placed) < most:
        kind = kinds.pop(0) if kinds else str(random.choice(["mixed", "button", "check", "field", "tools"]))
        count = min(most - len(placed), int(random.integers(1, 6)))
        widgets = []
        for _ in range(count):
            name = names.take(icon=kind == "tools" or (kind == "mixed" and bool(random.random() < 0.4)))
            if name:
                widgets.append(make_widget(random, name, _KIND_OF_ROW.get(kind)))
        row = _row(random, window, y, widgets)
        for widget in widgets[len(row) :]:
            names.give_back(widget.name)
        placed += row
        tallest = max((element.widget.size[1] for element in row), default=16)
        y += tallest + GAP + 2 + int(random.integers(0, 16))
    return placed


def random_scene(
    random: np.random.Generator, height: int, width: int, fewest: int, most: int
) -> tuple[Scene, Names]:
    """A screen of about ``fewest`` to ``most`` elements, at least two, and the names that are left."""
    scene, names = empty_scene(random, height, width), Names(random)
    wanted = int(random.integers(fewest, most + 1))
    share = max(2, wanted // len(scene.windows))
    for window in scene.windows:
        if random.random() < 0.6:
            scene = replace(scene, elements=scene.elements + tuple(_rows(random, window, names, share)))
    for _ in range(3 * wanted):
        if len(scene.elements) >= max(2, wanted):
            break
        scene = place_new(random, scene, names)
    return scene, names
