# SPDX-License-Identifier: Apache-2.0
"""Synthetic GUI screenshots: windows with icons, buttons and check boxes, and the questions about them.

Everything is drawn with numpy from masks that are rendered once, so a screen costs about two
milliseconds. All randomness comes from the generator that is passed in: the same seed draws the same
screen on every machine (Pillow's built-in bitmap font is used, never a system font).
"""

from dataclasses import dataclass, field

import numpy as np

from starkv.synthetic.questions import VERBS
from starkv.synthetic.widgets import (
    COLOR_NAMES,
    COLORS,
    ICON_MASKS,
    SHAPES,
    THEMES,
    WORD_MASKS,
    WORDS,
    Box,
    Theme,
    fill,
    framed,
    stamp,
)


@dataclass(frozen=True)
class Element:
    """One widget. An icon has a colour and a shape; a button or a check box has a word."""

    kind: str
    color: int = -1
    shape: int = -1
    word: int = -1
    icon_size: int = 0
    padding: int = 0
    decorated: bool = False
    """Icon: drawn on a button. Check box: checked."""
    box: Box = (0, 0, 0, 0)

    @property
    def phrase(self) -> str:
        """How a question names the element."""
        if self.kind == "icon":
            return f"the {COLOR_NAMES[self.color]} {SHAPES[self.shape]}"
        return f"'{WORDS[self.word]}'"

    @property
    def center(self) -> tuple[int, int]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) // 2, (y0 + y1) // 2

    def contains(self, x: float, y: float) -> bool:
        """Whether a click at this pixel hits the element."""
        x0, y0, x1, y1 = self.box
        return x0 <= x < x1 and y0 <= y < y1


@dataclass(frozen=True)
class Question:
    """A request, the answer that the model should give, and the box in which a click counts."""

    text: str
    answer: str
    element: Element


@dataclass
class Screen:
    """An RGB image uint8 [height, width, 3] and what is on it."""

    image: np.ndarray
    theme: Theme
    panel: Box
    elements: list[Element] = field(default_factory=list)


def empty_screen(rng: np.random.Generator, height: int, width: int) -> Screen:
    """A desktop with one window of random place and theme."""
    theme = THEMES[rng.integers(len(THEMES))]
    image = np.empty((height, width, 3), np.uint8)
    image[:] = theme.desktop
    x0, y0 = int(rng.integers(0, width // 8)), int(rng.integers(0, height // 8))
    x1, y1 = width - int(rng.integers(0, width // 8)), height - int(rng.integers(0, height // 8))
    framed(image, (x0, y0, x1, y1), theme.border, theme.panel)
    fill(image, (x0 + 1, y0 + 1, x1 - 1, y0 + 13), theme.title_bar)
    for index, color in enumerate(((220, 60, 60), (230, 190, 60), (70, 180, 80))):
        fill(image, (x1 - 10 - index * 9, y0 + 4, x1 - 5 - index * 9, y0 + 9), color)
    return Screen(image, theme, (x0 + 4, y0 + 16, x1 - 4, y1 - 4))


def _measure(element: Element) -> tuple[int, int]:
    if element.kind == "icon":
        return element.icon_size + 6, element.icon_size + 6
    height, width = WORD_MASKS[element.word].shape
    if element.kind == "button":
        return width + 2 * element.padding, height + 5
    return width + 16, max(height, 12)


def _draw(screen: Screen, element: Element, x: int, y: int) -> Element:
    image, theme = screen.image, screen.theme
    width, height = _measure(element)
    if element.kind == "button" or (element.kind == "icon" and element.decorated):
        framed(image, (x, y, x + width, y + height), theme.border, theme.button)
    if element.kind == "icon":
        color = COLORS[COLOR_NAMES[element.color]]
        stamp(image, ICON_MASKS[element.shape, element.icon_size], x + 3, y + 3, color)
    elif element.kind == "button":
        stamp(image, WORD_MASKS[element.word], x + element.padding, y + 3, theme.text)
    else:
        framed(image, (x, y, x + 11, y + 11), theme.border, (255, 255, 255))
        if element.decorated:
            fill(image, (x + 3, y + 3, x + 8, y + 8), (30, 90, 200))
        stamp(image, WORD_MASKS[element.word], x + 15, y, theme.text)
    placed = Element(**{**element.__dict__, "box": (x, y, x + width, y + height)})
    screen.elements.append(placed)
    return placed


def place(screen: Screen, element: Element, rng: np.random.Generator, tries: int = 20) -> Element | None:
    """Draw ``element`` at a free random place; None when no free place was found."""
    width, height = _measure(element)
    x0, y0, x1, y1 = screen.panel
    if x1 - x0 <= width + 4 or y1 - y0 <= height + 4:
        return None
    gap = 4
    for _ in range(tries):
        x, y = int(rng.integers(x0 + 2, x1 - width - 1)), int(rng.integers(y0 + 2, y1 - height - 1))
        if all(
            x > box[2] + gap or x + width < box[0] - gap or y > box[3] + gap or y + height < box[1] - gap
            for box in (other.box for other in screen.elements)
        ):
            return _draw(screen, element, x, y)
    return None


def random_elements(rng: np.random.Generator, count: int, icon_share: float = 0.5) -> list[Element]:
    """``count`` elements with distinct names.

    On half of the screens with two or more icons, the first two icons share their colour and differ in
    shape, so that colour alone can't tell them apart.
    """
    elements: list[Element] = []
    words = rng.permutation(len(WORDS))
    colors = [int(color) for color in rng.permutation(len(COLORS))]
    if rng.random() < 0.5:
        colors.insert(1, colors[0])
    shapes = rng.permutation(len(SHAPES))
    icons = 0
    for index in range(count):
        if rng.random() < icon_share and icons < len(colors):
            # The first two shapes come from a permutation: a shared colour never shares its shape.
            shape = int(shapes[icons]) if icons < 2 else int(rng.integers(len(SHAPES)))
            size, framed = int(rng.integers(14, 22)), bool(rng.random() < 0.4)
            elements.append(
                Element("icon", color=colors[icons], shape=shape, icon_size=size, decorated=framed)
            )
            icons += 1
        elif rng.random() < 0.7:
            elements.append(
                Element("button", word=int(words[index % len(words)]), padding=int(rng.integers(4, 11)))
            )
        else:
            elements.append(
                Element("check", word=int(words[index % len(words)]), decorated=bool(rng.random() < 0.5))
            )
    return elements


def random_screen(
    rng: np.random.Generator,
    height: int,
    width: int,
    fewest: int = 6,
    most: int = 14,
    icon_share: float = 0.5,
) -> Screen:
    """A window with ``fewest`` to ``most`` elements, at least one of them placed."""
    screen = empty_screen(rng, height, width)
    for element in random_elements(rng, int(rng.integers(fewest, most + 1)), icon_share):
        place(screen, element, rng)
    while not screen.elements:
        place(screen, random_elements(rng, 1, 1.0)[0], rng, tries=300)
    return screen


def ask(rng: np.random.Generator, element: Element) -> Question:
    """A question about ``element``; the right answer clicks its centre."""
    x, y = element.center
    text = f"{VERBS[rng.integers(len(VERBS))]} {element.phrase}."
    return Question(text, f"Action: click(start_box='({x},{y})')", element)


def random_questions(rng: np.random.Generator, screen: Screen, count: int) -> list[Question]:
    """``count`` questions that go round the screen's elements in random order."""
    order = rng.permutation(len(screen.elements))
    return [ask(rng, screen.elements[int(order[index % len(order)])]) for index in range(count)]
