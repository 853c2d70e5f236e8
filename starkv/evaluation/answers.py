# SPDX-License-Identifier: Apache-2.0
"""A model's reply as graders see it: actions with their places as shares of the screen's sides."""

from dataclasses import dataclass
from typing import NamedTuple

from starkv.manifest import CoordinateConvention
from starkv.runtime.actions.coordinates import Size
from starkv.runtime.actions.types import Action, Point
from starkv.runtime.agent import AgentReply


class Place(NamedTuple):
    """A place on the screen: 0 is its left or upper edge, 1 the other one.

    Unlike a click that is carried out it is not moved onto the screen: what points past the edge is wrong.
    """

    x: float
    y: float


@dataclass(frozen=True)
class PlacedAction:
    """An action with its places on the screen."""

    action: Action
    place: Place | None = None
    """Where it acts, or where a drag begins; None if it has no place."""
    end: Place | None = None
    """Where a drag ends."""


@dataclass(frozen=True)
class Answer:
    """What a model wants done."""

    actions: tuple[PlacedAction, ...]
    """In order; empty if the reply is no action, which every rule takes as wrong."""
    screen: Size
    """Pixels of the screenshot."""

    @property
    def first(self) -> PlacedAction | None:
        return self.actions[0] if self.actions else None

    def pixels(self, place: Place) -> tuple[float, float]:
        """Pixels of the screenshot at a place."""
        # Edges belong to boxes: the way through shares must not push a point over one.
        return round(place.x * self.screen.width, 6), round(place.y * self.screen.height, 6)


def answer_of(reply: AgentReply, convention: CoordinateConvention) -> Answer:
    """Place a reply's actions on the screen.

    Args:
        reply: of the agent.
        convention: how the model counts.
    """
    span = reply.resized if convention == "absolute" else Size(1000, 1000)

    def place(point: object) -> Place | None:
        return Place(point.x / span.width, point.y / span.height) if isinstance(point, Point) else None

    placed = tuple(
        PlacedAction(
            action,
            place(getattr(action, "point", None) or getattr(action, "start", None)),
            place(getattr(action, "end", None)),
        )
        for action in reply.actions
    )
    return Answer(placed, reply.original)
