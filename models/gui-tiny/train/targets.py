# SPDX-License-Identifier: Apache-2.0
"""Dense auxiliary supervision: what each visual token shows, and which of them an answer is about.

Without it the language model sits on a plateau where it ignores the image. With it every visual token
is told which element covers its 28-pixel cell and where that element's centre is, and one attention head
is told where to look while an answer is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from model import CELL
from torch import Tensor, nn

from starkv.synthetic.widgets import COLORS, SHAPES, WORDS, Box

IGNORE = -100
BIN = 4
"""Pixels per bin of a position."""
OFFSET_BINS = 21
"""Of a centre relative to its cell: −42 … +42 pixels."""
MOST_BINS = 140
"""Of a centre on the screen, up to 560 pixels."""
SMALLEST_OVERLAP = 60
"""Pixels; an element that covers less of a cell does not own it."""
SHOWN = {"kind": 3, "color": len(COLORS), "shape": len(SHAPES), "word": len(WORDS)}
"""What a cell shows → number of classes. Kinds: nothing, icon, word."""
COMPARED = {"new": 2, "clicked": 2}
"""What a cell knows of the frame before and of the pointer."""
RARE = 8.0
"""Weight of the cells that are new or clicked; few are."""


@dataclass(frozen=True)
class Shown:
    """One element of a screen, as cells have to know it; −1: has none."""

    box: Box
    color: int
    shape: int
    word: int
    new: bool = False
    clicked: bool = False

    @property
    def center(self) -> tuple[int, int]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) // 2, (y0 + y1) // 2


def cell_owners(boxes: Sequence[Box], height: int, width: int) -> np.ndarray:
    """int64 ``[rows, columns]``: number of the box that covers most of each cell, −1 where none does."""
    rows, columns = height // CELL, width // CELL
    covered = np.full((rows, columns), SMALLEST_OVERLAP)
    owners = np.full((rows, columns), -1, np.int64)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        for row in range(max(0, y0 // CELL), min(rows - 1, (y1 - 1) // CELL) + 1):
            for column in range(max(0, x0 // CELL), min(columns - 1, (x1 - 1) // CELL) + 1):
                overlap_x = min(x1, (column + 1) * CELL) - max(x0, column * CELL)
                overlap_y = min(y1, (row + 1) * CELL) - max(y0, row * CELL)
                if overlap_x * overlap_y > covered[row, column]:
                    covered[row, column] = overlap_x * overlap_y
                    owners[row, column] = number
    return owners


def cell_facts(shown: Sequence[Shown], owners: np.ndarray, relative: bool, compared: bool) -> np.ndarray:
    """int64 ``[8, rows, columns]``: kind, colour, shape, word, centre x and y in bins, new, clicked.

    Args:
        shown: the elements.
        owners: of the cells.
        relative: centres relative to the cell (what a vision tower can know), instead of on the screen (what
            the language model has to know).
        compared: there is a frame before, so that cells can know what is new.
    """
    rows, columns = owners.shape
    kinds = [1 if element.word < 0 else 2 for element in shown]
    facts = np.full((8, rows, columns), IGNORE, np.int64)
    facts[0] = np.append(kinds, 0)[owners]
    owned = owners >= 0
    for number, name in enumerate(("color", "shape", "word"), 1):
        values = np.array([getattr(element, name) for element in shown] + [-1])[owners]
        facts[number] = np.where(values < 0, IGNORE, values)
    centers = np.array([element.center for element in shown] + [(0, 0)])
    own = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)))  # x, y
    for axis in (0, 1):
        pixels = centers[:, axis][owners]
        if relative:
            offset = pixels - (own[axis] * CELL + CELL // 2) + OFFSET_BINS * BIN // 2
            bins = np.clip(offset // BIN, 0, OFFSET_BINS - 1)
        else:
            bins = pixels // BIN
        facts[4 + axis] = np.where(owned, bins, IGNORE)
    if compared:
        facts[6] = np.array([element.new for element in shown] + [False])[owners]
    facts[7] = np.array([element.clicked for element in shown] + [False])[owners]
    return facts


class CellHeads(nn.Module):
    """Linear heads on visual tokens.

    Args:
        hidden: width of the tokens.
        classes: number of classes of each head.
        weights: of the classes of each head, if all have the same number of them.
    """

    def __init__(self, hidden: int, classes: Sequence[int], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.classes = list(classes)
        self.weights = None if weights is None else list(weights)
        self.linear = nn.Linear(hidden, sum(classes))

    def losses(self, tokens: Tensor, facts: Tensor) -> Tensor:
        """tokens ``[B, cells, hidden]``, facts ``[B, heads, cells]`` → mean loss of each head."""
        scores = self.linear(F.rms_norm(tokens.float(), (tokens.shape[-1],))).float()
        weights = None if self.weights is None else scores.new_tensor(self.weights)
        return torch.stack(
            [
                F.cross_entropy(
                    score.flatten(0, 1), want.flatten(), weights, ignore_index=IGNORE, reduction="sum"
                )
                / (want != IGNORE).sum().clamp(min=1)
                for score, want in zip(scores.split(self.classes, -1), facts.unbind(1), strict=True)
            ]
        )


def shown_heads(hidden: int, relative: bool) -> CellHeads:
    """Heads for what a cell shows and where the element's centre is."""
    bins = OFFSET_BINS if relative else MOST_BINS
    return CellHeads(hidden, [*SHOWN.values(), bins, bins])


def guidance_loss(attended_log: Tensor, looks: Tensor, evidence: Tensor, weights: Tensor) -> Tensor:
    """How little of one head's attention falls where it should look.

    Args:
        attended_log: log-probabilities ``[B, T, visual tokens]`` of the head.
        looks: number of the evidence that each row should look at, ``[B, T]``; −1: anywhere.
        evidence: ``[B, E, visual tokens]``, true where it lies.
        weights: of the rows, ``[B, T]``.
    """
    tokens = evidence.shape[-1]
    where = evidence.gather(1, looks.clamp(min=0)[..., None].expand(-1, -1, tokens))
    # An element hidden behind its neighbours may own no cell; nothing is asked of the head then. Its rows
    # still need a cell, because the gradient of an empty sum's logarithm is not a number.
    visible = where.any(-1)
    on_evidence = attended_log.masked_fill(~(where | ~visible[..., None]), float("-inf")).logsumexp(-1)
    counted = (looks >= 0) & visible
    return -torch.where(counted, on_evidence * weights, 0.0).sum() / counted.sum().clamp(min=1)


def reading_loss(logs: Tensor, wanted: Tensor) -> Tensor:
    """How little of one head's attention falls on the packed rows where it should look.

    Args:
        logs: log-probabilities ``[B, T, T]`` of the head.
        wanted: true where a row should look, ``[B, T, T]``; a row without any may look anywhere.
    """
    counted = wanted.any(-1)
    on_wanted = logs.masked_fill(~(wanted | ~counted[..., None]), float("-inf")).logsumexp(-1)
    return -torch.where(counted, on_wanted, 0.0).sum() / counted.sum().clamp(min=1)
