# SPDX-License-Identifier: Apache-2.0
"""How a desktop looks: its screen, what is typed into its fields, and what is open on top."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from starkv.synthetic.desktop import Desktop
from starkv.synthetic.scene import Element, draw_window, render
from starkv.synthetic.widgets import Box, Canvas, draw_pointer, draw_widget, fill, framed, stamp

_FOCUS = (30, 90, 200)
_TYPED = (20, 20, 20)


def draw_desktop(desktop: Desktop, pointer: Box | None = None) -> Canvas:
    """Draw a desktop.

    Args:
        desktop: what is on the screen.
        pointer: box of the element that was just clicked.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    canvas = render(desktop.scene)
    for element in desktop.scene.elements:
        if element.widget.kind == "field":
            _draw_content(canvas, element, desktop)
    popup = desktop.popup
    if popup:
        if popup.close_button:
            draw_window(canvas, popup.window)
        else:
            framed(canvas, popup.window.box, popup.window.theme.border, popup.window.theme.panel)
        for element in popup.elements:
            draw_widget(canvas, element.widget, element.x, element.y, element.theme)
    if pointer:
        draw_pointer(canvas, pointer)
    return canvas


def _draw_content(canvas: Canvas, field: Element, desktop: Desktop) -> None:
    """The text in a field's box, its end where it is too long; a coloured frame where it has the focus."""
    _, y0, x1, y1 = field.box
    x0 = x1 - field.widget.padding
    if desktop.focus == field.name:
        framed(canvas, (x0, y0, x1, y1), _FOCUS, (255, 255, 255))
    text = desktop.typed.get(field.name, "")
    if text:
        mask = _text_mask(text)[: y1 - y0 - 4, -(x1 - x0 - 7) :]
        stamp(canvas, mask, x0 + 3, y0 + 2, _TYPED)
    if desktop.focus == field.name:
        caret = x0 + 4 + (mask.shape[1] if text else 0)
        fill(canvas, (caret, y0 + 3, caret + 1, y1 - 3), _FOCUS)


def _text_mask(text: str) -> NDArray[np.bool_]:
    font = ImageFont.load_default_imagefont()
    # The built-in font has no other letters.
    text = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
    _, _, right, bottom = font.getbbox(text)
    image = Image.new("L", (max(1, int(right)), max(1, int(bottom))), 0)
    ImageDraw.Draw(image).text((0, 0), text, font=font, fill=255)
    return np.asarray(image) > 127
