# SPDX-License-Identifier: Apache-2.0
"""A desktop that answers to clicks and keys. What an element does is drawn with the screen, by a seed:

- a menu opens a list of entries, an entry closes it;
- some buttons and icons open a window with elements of its own, each of which closes it, as its red button
  does; every other button or icon goes away, and either others move or a new one appears;
- a check box changes its mark, a field gets the focus and takes what is typed.

While a list or a window is open, nothing else can be clicked; a click beside a list closes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from starkv.synthetic.layout import Names, make_widget, random_scene
from starkv.synthetic.popups import Popup, fits, popup_of
from starkv.synthetic.scene import Element, Scene, find_place
from starkv.synthetic.widgets import Name, Widget

MOST_MOVED = 3
"""Elements that one click moves."""
MOST_TYPED = 200
"""Characters that a field holds."""
_SCREEN, _CHANGES = 0, 1
"""Which part of a desktop's randomness: the screen and what it opens, or what clicks change."""
_OPENS_WINDOW = 0.35
"""Share of buttons and icons that open a window, as long as there are names for what is in it."""

Pressed = Literal["element", "close", "nothing"]


@dataclass(frozen=True)
class Press:
    """What a click met."""

    what: Pressed
    """An element; what closes a window or a list; or neither."""
    name: Name | None = None
    """Of the element."""


@dataclass(frozen=True)
class Desktop:
    """One state; clicks and keys make others."""

    scene: Scene
    seed: int
    contents: Mapping[Name, tuple[Widget, ...]]
    """Element → what is in the list or window that it opens."""
    spare: tuple[Name, ...]
    """Names that no element has yet."""
    changes: int = 0
    """Clicks so far that moved elements or brought new ones: what the next such click does depends on it."""
    opened: Name | None = None
    """Element whose list or window is open."""
    focus: Name | None = None
    """Field that takes what is typed."""
    typed: Mapping[Name, str] = field(default_factory=dict)
    """Field → its text."""

    @property
    def popup(self) -> Popup | None:
        """The list or window that is open."""
        opener = self.scene.find(self.opened) if self.opened else None
        if opener is None:
            return None
        return popup_of(self.scene, opener, self.contents[opener.name])

    @property
    def clickable(self) -> tuple[Element, ...]:
        """Elements that a click can reach."""
        popup = self.popup
        return popup.elements if popup else self.scene.elements

    def find(self, name: Name) -> Element | None:
        """A clickable element by its name."""
        return next((element for element in self.clickable if element.name == name), None)

    def at(self, x: float, y: float) -> Element | None:
        """The clickable element at a pixel."""
        return next((element for element in self.clickable if _inside(element.box, x, y)), None)

    def press(self, x: float, y: float) -> tuple["Desktop", Press]:
        """Click at a pixel."""
        element, popup = self.at(x, y), self.popup
        if element:
            return self._activate(element), Press("element", element.name)
        if popup and (popup.close_button is None or _inside(popup.close_button, x, y)):
            return replace(self, opened=None), Press("close")
        return (self if popup else replace(self, focus=None)), Press("nothing")

    def type(self, text: str) -> "Desktop":
        """Type into the field that has the focus; a line feed at the end takes the focus away."""
        if self.focus is None:
            return self
        content = (self.typed.get(self.focus, "") + text.rstrip("\n"))[:MOST_TYPED]
        focus = None if text.endswith("\n") else self.focus
        return replace(self, typed={**self.typed, self.focus: content}, focus=focus)

    def key(self, key: str) -> "Desktop":
        """Press a key: ``backspace`` and ``enter`` in a field, ``esc`` closes what is open."""
        if key in ("esc", "escape"):
            return replace(self, opened=None)
        if key in ("enter", "return"):
            return self.type("\n")
        if key == "backspace" and self.focus:
            return replace(self, typed={**self.typed, self.focus: self.typed.get(self.focus, "")[:-1]})
        return self

    def _activate(self, element: Element) -> "Desktop":
        name, kind = element.name, element.widget.kind
        pressed = replace(self, focus=None)
        if self.opened:
            return replace(pressed, opened=None)
        if name in self.contents:
            return replace(pressed, opened=name)
        if kind == "check":
            toggled = replace(element, widget=replace(element.widget, decorated=not element.widget.decorated))
            others = (toggled if other is element else other for other in self.scene.elements)
            return replace(pressed, scene=replace(self.scene, elements=tuple(others)))
        if kind == "field":
            return replace(pressed, focus=name)
        if kind == "menu":
            return pressed
        return pressed._moved_on(element)

    def _moved_on(self, clicked: Element) -> "Desktop":
        random = np.random.default_rng([self.seed, _CHANGES, self.changes])
        others = tuple(element for element in self.scene.elements if element is not clicked)
        scene = replace(self.scene, elements=others)
        changed = replace(self, changes=self.changes + 1)
        if self.spare and random.random() < 0.5:
            new = find_place(scene, make_widget(random, self.spare[0]), random)
            if new:
                grown = replace(scene, elements=(*others, new))
                return replace(changed, scene=grown, spare=self.spare[1:])
        for index in random.permutation(len(others))[: int(random.integers(1, MOST_MOVED + 1))]:
            place = find_place(scene, others[index].widget, random)
            if place:
                still = (element for element in scene.elements if element is not others[index])
                scene = replace(scene, elements=(*still, place))
        return replace(changed, scene=scene)


def random_desktop(seed: int, height: int, width: int, fewest: int, most: int) -> Desktop:
    """A desktop of about ``fewest`` to ``most`` elements, the same for the same seed and size in pixels."""
    random = np.random.default_rng([seed, _SCREEN])
    scene, names = random_scene(random, height, width, fewest, most)
    contents: dict[Name, tuple[Widget, ...]] = {}
    for element in scene.elements:
        kind = element.widget.kind
        if kind == "menu":
            inside = _widgets(random, names, icons=0.0)
        elif kind in ("button", "icon") and random.random() < _OPENS_WINDOW:
            inside = _widgets(random, names, icons=0.4)
        else:
            continue
        if len(inside) > 1 and fits(scene, popup_of(scene, element, inside)):
            contents[element.name] = inside
        else:
            for widget in inside:
                names.give_back(widget.name)
    return Desktop(scene, seed, contents, tuple(iter(lambda: names.take(bool(random.random() < 0.5)), None)))


def _widgets(random: np.random.Generator, names: Names, icons: float) -> tuple[Widget, ...]:
    """Two or three elements for a list (no icons) or a window; fewer where names of that sort are used up."""
    widgets: list[Widget] = []
    for _ in range(int(random.integers(2, 4))):
        name = names.take(icon=bool(random.random() < icons))
        if name is None:
            break
        if name.is_icon and not icons:
            names.give_back(name)
            break
        widgets.append(make_widget(random, name, "button" if icons else "menu"))
    return tuple(widgets)


def _inside(box: tuple[int, int, int, int], x: float, y: float) -> bool:
    x0, y0, x1, y1 = box
    return x0 <= x < x1 and y0 <= y < y1
