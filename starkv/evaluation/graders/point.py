# SPDX-License-Identifier: Apache-2.0
"""The rules of single clicks."""

from starkv.evaluation.answers import Answer
from starkv.evaluation.boxes import Box
from starkv.runtime.actions.types import Click

POINT_IN_BOX, CLICK_IN_BOX = "point-in-box", "click-in-box"


def point_in_box(answer: Answer, box: Box) -> float:
    """1 if the place of the first action lies in the element's box, edges included.

    Which action it is does not matter: hovering over the right element is right.

    Args:
        answer: of the model.
        box: pixels of the screenshot.
    """
    first = answer.first
    if first is None or first.place is None:
        return 0.0
    return float(box.holds(*answer.pixels(first.place)))


def click_in_box(answer: Answer, box: Box) -> float:
    """1 if the first action clicks in the element's box, whose right and lower edge don't belong to it.

    Args:
        answer: of the model.
        box: pixels of the screenshot.
    """
    first = answer.first
    if first is None or first.place is None or not isinstance(first.action, Click):
        return 0.0
    x, y = answer.pixels(first.place)
    return float(box.left <= x < box.right and box.top <= y < box.bottom)
