# SPDX-License-Identifier: Apache-2.0
"""Where elements lie in relation to each other."""

from starkv.synthetic.scene import Element, Scene
from starkv.synthetic.widgets import Box

RELATIONS = ("left of", "right of", "above", "below")
FARTHEST = 150
"""Pixels from edge to edge beyond which an element is no neighbour."""
CLEARLY = 12
"""Pixels by which the second nearest has to be farther away."""
_OPPOSITE = {"left of": "right of", "above": "below"}


def _distance(reference: Box, other: Box, relation: str) -> int | None:
    """Pixels from edge to edge; None if ``other`` does not lie there, or is less than half in line."""
    if relation in _OPPOSITE:
        reference, other = _mirrored(reference), _mirrored(other)
        relation = _OPPOSITE[relation]
    if relation == "below":
        reference, other = _turned(reference), _turned(other)
    overlap = min(reference[3], other[3]) - max(reference[1], other[1])
    smaller = min(reference[3] - reference[1], other[3] - other[1])
    gap = other[0] - reference[2]
    return gap if gap >= 0 and 2 * overlap >= smaller else None


def _mirrored(box: Box) -> Box:
    x0, y0, x1, y1 = box
    return -x1, -y1, -x0, -y0


def _turned(box: Box) -> Box:
    x0, y0, x1, y1 = box
    return y0, x0, y1, x1


def neighbour(scene: Scene, reference: Element, relation: str) -> Element | None:
    """The element next to another in one of ``RELATIONS``; None if there is none, or it isn't clear which."""
    found = sorted(
        (distance, index)
        for index, element in enumerate(scene.elements)
        if element is not reference
        and (distance := _distance(reference.box, element.box, relation)) is not None
    )
    if not found or found[0][0] > FARTHEST:
        return None
    if len(found) > 1 and found[1][0] - found[0][0] < CLEARLY:
        return None
    return scene.elements[found[0][1]]
