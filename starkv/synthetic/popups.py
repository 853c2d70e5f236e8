# SPDX-License-Identifier: Apache-2.0
"""What opens on top of a drawn desktop: the list of a menu, and small windows."""

from collections.abc import Sequence
from dataclasses import dataclass

from starkv.synthetic.scene import GAP, TITLE_HEIGHT, Element, Scene, Window
from starkv.synthetic.widgets import Box, Widget

_MARGIN = 8
"""Pixels between the elements of a window and its edge."""


@dataclass(frozen=True)
class Popup:
    """A list or window, and what is in it."""

    window: Window
    elements: tuple[Element, ...]
    close_button: Box | None
    """Of a window, in its title bar; a list has none."""


def popup_of(scene: Scene, opener: Element, contents: Sequence[Widget]) -> Popup:
    """What an element opens: a menu its list, anything else a window."""
    make = list_popup if opener.widget.kind == "menu" else window_popup
    return make(scene, opener, contents)


def list_popup(scene: Scene, opener: Element, contents: Sequence[Widget]) -> Popup:
    """The list of a menu: entries one below the other, under the menu, or above it where room lacks."""
    sizes = [entry.size for entry in contents]
    width, height = max(w for w, _ in sizes) + 4, sum(h for _, h in sizes) + 4
    x0, y0, _, y1 = opener.box
    x = max(0, min(x0, scene.width - width))
    y = y1 if y1 + height <= scene.height else y0 - height
    elements, top = [], y + 2
    for entry in contents:
        elements.append(Element(entry, x + 2, top, opener.theme))
        top += entry.size[1]
    return Popup(Window((x, y, x + width, y + height), opener.theme), tuple(elements), None)


def window_popup(scene: Scene, opener: Element, contents: Sequence[Widget]) -> Popup:
    """A small window in the middle of the screen, its elements side by side."""
    sizes = [widget.size for widget in contents]
    width = max(60, sum(w for w, _ in sizes) + (GAP + 3) * (len(sizes) - 1) + 2 * _MARGIN)
    height = max(h for _, h in sizes) + TITLE_HEIGHT + 2 * _MARGIN
    x, y = (scene.width - width) // 2, (scene.height - height) // 2
    elements, left = [], x + _MARGIN
    for widget in contents:
        elements.append(Element(widget, left, y + TITLE_HEIGHT + _MARGIN, opener.theme))
        left += widget.size[0] + GAP + 3
    # The red one of the title bar's buttons, and a pixel around it.
    right = x + width
    close = (right - 11, y + 3, right - 4, y + 10)
    return Popup(Window((x, y, right, y + height), opener.theme), tuple(elements), close)


def fits(scene: Scene, popup: Popup) -> bool:
    """Whether a popup lies on the screen."""
    x0, y0, x1, y1 = popup.window.box
    return x0 >= 0 and y0 >= 0 and x1 <= scene.width and y1 <= scene.height
