# SPDX-License-Identifier: Apache-2.0
"""Random screens: desktops of one to three windows, with rows of widgets or widgets all over the place."""

from collections.abc import Sequence
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


class Names:
    """Names in random order, none of them twice."""

    def __init__(self, random: np.random.Generator) -> None:
        self._words = [Name(word=int(index)) for index in random.permutation(len(WORDS))]
        count = len(COLOR_NAMES) * len(SHAPES)
        self._icons = [
            Name(color=int(index) // len(SHAPES), shape=int(index) % len(SHAPES))
            for index in random.permutation(count)
        ]

    def icon(self) -> Name:
        """The next icon. There are 64: a screen holds fewer."""
        return self._icons.pop()

    def word(self) -> Name | None:
        """The next word; None if all are used."""
        return self._words.pop() if self._words else None


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


def new_widget(random: np.random.Generator, names: Names) -> Widget:
    """An icon or a word that was not there before."""
    word = names.word() if random.random() < 0.5 else None
    return make_widget(random, word or names.icon())


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
            word = None if kind == "tools" or (kind == "mixed" and random.random() < 0.4) else names.word()
            fixed: Kind | None = kind if kind in ("menu", "button", "check", "field") else None  # type: ignore[assignment]
            widgets.append(make_widget(random, word or names.icon(), fixed if word else None))
        row = _row(random, window, y, widgets)
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
    tries = 3 * wanted
    while tries and (len(scene.elements) < wanted or len(scene.elements) < 2):
        element = find_place(scene, new_widget(random, names), random)
        scene = replace(scene, elements=(*scene.elements, element)) if element else scene
        tries -= 1
    return scene, names
