# SPDX-License-Identifier: Apache-2.0
"""Dense auxiliary supervision: what each visual token shows, and which of them an answer is about.

Without it the language model sits on a plateau where it ignores the image. With it every visual token
is told which element covers its 28-pixel cell and where that element's centre is, and one attention head
is told to look at the element in question.
"""

import numpy as np
import torch
import torch.nn.functional as F
from model import CELL
from screens import COLORS, SHAPES, WORDS, Screen
from torch import Tensor, nn

IGNORE = -100
KINDS = 3  # nothing, icon, word
BIN = 4  # pixels per position bin
OFFSET_BINS = 21  # centre relative to the cell's own, −42 … +42 pixels
SMALLEST_OVERLAP = 60  # pixels; an element that covers less of a cell does not own it


def cell_targets(screen: Screen) -> np.ndarray:
    """int64 [6, cells]: kind, colour, shape, word, centre x and y of each cell's owner (−100: none)."""
    height, width, _ = screen.image.shape
    rows, columns = height // CELL, width // CELL
    covered = np.full((rows, columns), SMALLEST_OVERLAP)
    targets = np.full((6, rows, columns), IGNORE, np.int64)
    targets[0] = 0
    for element in screen.elements:
        x0, y0, x1, y1 = element.box
        icon = element.kind == "icon"
        center_x, center_y = element.center
        facts = (1 if icon else 2, element.color, element.shape, element.word, center_x, center_y)
        for row in range(max(0, y0 // CELL), min(rows - 1, (y1 - 1) // CELL) + 1):
            for column in range(max(0, x0 // CELL), min(columns - 1, (x1 - 1) // CELL) + 1):
                overlap_x = min(x1, (column + 1) * CELL) - max(x0, column * CELL)
                overlap_y = min(y1, (row + 1) * CELL) - max(y0, row * CELL)
                if overlap_x * overlap_y > covered[row, column]:
                    covered[row, column] = overlap_x * overlap_y
                    targets[:, row, column] = [IGNORE if fact == -1 else fact for fact in facts]
    return targets.reshape(6, -1)


class CellHeads(nn.Module):
    """Linear heads on visual tokens.

    Args:
        hidden: width of the tokens.
        size: image side in pixels.
        relative: predict the centre relative to the cell (what a vision tower can know) instead of on
            the screen (what the language model has to know).
    """

    def __init__(self, hidden: int, size: int, relative: bool) -> None:
        super().__init__()
        self.relative, self.cells = relative, size // CELL
        bins = OFFSET_BINS if relative else size // BIN
        self.widths = [KINDS, len(COLORS), len(SHAPES), len(WORDS), bins, bins]
        self.linear = nn.Linear(hidden, sum(self.widths))

    def _bins(self, pixels: Tensor, axis: int) -> Tensor:
        if not self.relative:
            return torch.where(pixels == IGNORE, IGNORE, pixels // BIN)
        cell = torch.arange(self.cells, device=pixels.device)
        own = cell.repeat(self.cells) if axis == 0 else cell.repeat_interleave(self.cells)
        offset = pixels - (own * CELL + CELL // 2) + OFFSET_BINS * BIN // 2
        return torch.where(pixels == IGNORE, IGNORE, (offset // BIN).clamp(0, OFFSET_BINS - 1))

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens [B, cells, hidden], targets of :func:`cell_targets` [B, 6, cells] → six mean losses."""
        scores = self.linear(F.rms_norm(tokens.float(), (tokens.shape[-1],))).float().split(self.widths, -1)
        wanted = [*targets[:, :4].unbind(1), self._bins(targets[:, 4], 0), self._bins(targets[:, 5], 1)]
        return torch.stack(
            [
                F.cross_entropy(score.flatten(0, 1), want.flatten(), ignore_index=IGNORE, reduction="sum")
                / (want != IGNORE).sum().clamp(min=1)
                for score, want in zip(scores, wanted, strict=True)
            ]
        )


def guidance_loss(attended_log: Tensor, targets: Tensor, cells: Tensor, centers: Tensor) -> Tensor:
    """How little of one head's attention falls on the cells of the element in question.

    Args:
        attended_log: log-probabilities ``[B, questions * segment, visual tokens]`` of the head.
        targets: next-token targets ``[B, questions * segment]``; rows without one are left out.
        cells: facts of :func:`cell_targets`, ``[B, 6, visual tokens]``.
        centers: centre of each question's element in pixels ``[B, questions, 2]``: no two elements share one.
    """
    owned = (cells[:, None, 4:] == centers[..., None]).all(2)  # [B, questions, visual tokens]
    batch, questions, tokens = owned.shape
    # An element hidden behind its neighbours may own no cell; nothing is asked of the head then. Its rows
    # still need a cell, because the gradient of an empty sum's logarithm is not a number.
    visible = owned.any(-1, keepdim=True)
    elsewhere = ~(owned | ~visible)[:, :, None]
    by_question = attended_log.view(batch, questions, -1, tokens)
    on_element = by_question.masked_fill(elsewhere, float("-inf")).logsumexp(-1)
    counted = (targets.view(batch, questions, -1) != IGNORE) & visible
    return -torch.where(counted, on_element, 0.0).sum() / counted.sum().clamp(min=1)
