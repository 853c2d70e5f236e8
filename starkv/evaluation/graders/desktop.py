# SPDX-License-Identifier: Apache-2.0
"""The rules of AgentNetBench's steps.

``first-action-exp-distance`` follows the driver of STaR-KV's authors: the first action
counts alone, a place outside the boxes earns exp(−120·(d − 0.0141)) for a distance of d in shares of the
screen's sides, every scroll is right, and keys may come in any order.

``all-actions-in-box`` follows OpenCUA's own evaluation, without its credit for distance: every action of the
step in its order, places in the box, the scroll's direction, keys in their order; extra actions cost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starkv.evaluation.answers import Answer, Place, PlacedAction
from starkv.evaluation.boxes import Box
from starkv.evaluation.graders.text import similarity
from starkv.runtime.actions.types import (
    CallUser,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    Hover,
    Press,
    RightClick,
    Scroll,
    Select,
    TripleClick,
    TypeText,
    Wait,
)

LENIENT, STRICT = "first-action-exp-distance", "all-actions-in-box"
NEAR = 0.01 * math.sqrt(2)
"""Distance that costs nothing: 1 % of either side."""
DECAY = 120
SIMILAR = 0.8
"""Similarity from which a typed text is right."""
_SIMPLE = {Click: "click", DoubleClick: "doubleclick", TripleClick: "tripleclick", RightClick: "rightclick"}
_CLICKS = frozenset(_SIMPLE.values())
_SUBMITS = (("enter",), ("return",))


@dataclass(frozen=True)
class DesktopAction:
    """An action on a desktop in AgentNetBench's words, which are PyAutoGUI's in lower case.

    ``press`` and ``hotkey`` are one type, ``keys``: UI-TARS has one action for both.
    """

    type: str
    place: Place | None = None
    text: str = ""
    """What is written, a scroll's direction (empty if the data set doesn't say), or a status."""
    keys: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    """Where a place is right, in shares of the screen's sides."""


def desktop_actions(placed: PlacedAction) -> list[DesktopAction]:
    """What a model's action is called in AgentNetBench: a drag is a movement and a drag there."""
    action = placed.action
    match action:
        case Click() | DoubleClick() | TripleClick() | RightClick():
            return [DesktopAction(_SIMPLE[type(action)], placed.place)]
        case Hover():
            return [DesktopAction("moveto", placed.place)]
        case Drag() | Select():
            return [DesktopAction("moveto", placed.place), DesktopAction("dragto", placed.end)]
        case TypeText(content):
            return [DesktopAction("write", text=content)]
        case Hotkey(keys):
            return [DesktopAction("keys", keys=tuple(key.lower() for key in keys))]
        case Press(key):
            return [DesktopAction("keys", keys=(key.lower(),))]
        case Scroll(direction):
            return [DesktopAction("scroll", text=direction)]
        case Finished():
            return [DesktopAction("terminate", text="success")]
        case CallUser():
            return [DesktopAction("terminate", text="failure")]
        case Wait():
            return [DesktopAction("wait")]
        case other:
            return [DesktopAction(f"none of the data set's: {type(other).__name__}", placed.place)]


def grade_step(answer: Answer, options: Sequence[Sequence[DesktopAction]]) -> dict[str, float]:
    """Both rules; of several right ways the one that the answer comes nearest to.

    Args:
        answer: of the model.
        options: right ways to take the step, at least one, each of at least one action.
    """
    done = joined([action for placed in answer.actions for action in desktop_actions(placed)])
    ways = [joined(option) for option in options]
    return {
        LENIENT: max(lenient(done, way) for way in ways),
        STRICT: max(strict(done, way) for way in ways),
    }


def joined(actions: Sequence[DesktopAction]) -> list[DesktopAction]:
    """Actions as UI-TARS says them, where the data set takes two for one.

    Writing and then the enter key is a text with a line feed at its end; moving to a place and then clicking
    there is the click.
    """
    result: list[DesktopAction] = []
    for action in actions:
        before = result[-1] if result else None
        if before and before.type == "write" and action.type == "keys" and action.keys in _SUBMITS:
            result[-1] = replace(before, text=before.text + "\n")
        elif before and before.type == "moveto" and action.type in _CLICKS and action.place == before.place:
            result[-1] = replace(action, boxes=action.boxes or before.boxes)
        else:
            result.append(action)
    return result


def lenient(done: Sequence[DesktopAction], wanted: Sequence[DesktopAction]) -> float:
    """``first-action-exp-distance``."""
    if not done or done[0].type != wanted[0].type:
        return 0.0
    first, right = done[0], wanted[0]
    if right.place is not None:
        if first.place is None:
            return 0.0
        return 1.0 if _in_box(first.place, right) else distance_credit(math.dist(first.place, right.place))
    if right.type == "keys":
        return float(set(first.keys) == set(right.keys))
    return 1.0 if right.type == "scroll" else _same_words(first, right)


def strict(done: Sequence[DesktopAction], wanted: Sequence[DesktopAction]) -> float:
    """``all-actions-in-box``: the share of right actions, less if there are more than wanted."""
    if not done or done[0].type != wanted[0].type:
        return 0.0
    right = sum(_strict_action(*pair) for pair in zip(done, wanted, strict=False))
    return right / max(len(wanted), len(done))


def distance_credit(distance: float) -> float:
    """What a place outside the boxes earns, by its distance in shares of the screen's sides."""
    return 1.0 if distance <= NEAR else math.exp(-DECAY * (distance - NEAR))


def _strict_action(done: DesktopAction, wanted: DesktopAction) -> float:
    if done.type != wanted.type:
        return 0.0
    if wanted.place is not None:
        if done.place is None:
            return 0.0
        # Places without a box of an element are right as near as costs nothing by the lenient rule.
        near = not wanted.boxes and math.dist(done.place, wanted.place) <= NEAR
        return float(near or _in_box(done.place, wanted))
    if wanted.type == "keys":
        return float(done.keys == wanted.keys)
    if wanted.type == "scroll":
        return float(not wanted.text or done.text == wanted.text)
    return float(_same_words(done, wanted) == 1.0)


def _in_box(place: Place, wanted: DesktopAction) -> bool:
    return any(box.holds(*place) for box in wanted.boxes)


def _same_words(done: DesktopAction, wanted: DesktopAction) -> float:
    if wanted.type != "write":
        return float(done.text == wanted.text)
    alike = similarity(done.text.strip().lower(), wanted.text.strip().lower())
    return 1.0 if alike >= SIMILAR else alike / SIMILAR
