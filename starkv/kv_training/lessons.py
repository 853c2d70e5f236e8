# SPDX-License-Identifier: Apache-2.0
"""Sequences with a place where the student begins, and several of them laid out as one batch.

Symbols: L layers, S rows of a sequence, G KV heads, D head dim; and of a batch: B sequences, P packed rows, R
recent rows, N new rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Rows:
    """A sequence as the decoder takes it."""

    embeds: Tensor
    """``[S, hidden]``."""
    cosines: Tensor
    """``[S, D/2]`` f32."""
    sines: Tensor
    """``[S, D/2]`` f32."""


@dataclass(frozen=True)
class ExactPass:
    """What the uncompressed model makes of a sequence."""

    keys: Tensor
    """``[L, S, G·D]``: what the key projections put out without bias, before rotation."""
    values: Tensor
    """``[L, S, G·D]``: likewise of the value projections."""
    hidden: Tensor
    """``[S, hidden]``: what the last layer puts out."""


@dataclass(frozen=True)
class Lesson:
    """Where a student begins in a sequence, and which of its tokens count."""

    rows: Rows
    exact: ExactPass
    start: int
    """First row that is computed with compressed rows behind it."""
    counted: Tensor
    """``[S]`` bool: rows for which the student is to say what the teacher says."""


@dataclass(frozen=True)
class LessonBatch:
    """Lessons side by side, each of its three runs of rows filled up to the longest."""

    recent: int
    embeds: Tensor
    """``[B, N, hidden]``."""
    tables: tuple[Tensor, Tensor]
    """``[B, P + R + N, D/2]``."""
    visible: Tensor
    """``[B, 1, N, P + R + N]`` bool."""
    counted: Tensor
    """``[B, N]`` bool."""

    @classmethod
    def of(cls, lessons: Sequence[Lesson], recent: int) -> "LessonBatch":
        """Lay lessons side by side.

        Args:
            lessons: of any lengths.
            recent: rows before each start that stay exact.
        """
        runs = [
            (slice(0, max(0, each.start - recent)), slice(max(0, each.start - recent), each.start))
            for each in lessons
        ]
        news = [slice(each.start, None) for each in lessons]

        def laid_out(tables: Sequence[Tensor]) -> Tensor:
            thirds = [
                _stacked([table[run] for table, run in zip(tables, chosen, strict=True)])
                for chosen in ([old for old, _ in runs], [kept for _, kept in runs], news)
            ]
            return torch.cat(thirds, dim=1)

        valid = laid_out([torch.ones_like(each.counted) for each in lessons])
        embeds = _stacked([each.rows.embeds[run] for each, run in zip(lessons, news, strict=True)])
        new = embeds.shape[1]
        behind = valid.shape[1] - new
        # A row that only fills up sees itself, so that nothing is divided by zero.
        causal = torch.ones(new, new, dtype=torch.bool, device=valid.device).tril()
        own = torch.eye(new, dtype=torch.bool, device=valid.device)
        among_new = causal & (valid[:, None, behind:] | own)
        before = valid[:, None, :behind].expand(-1, new, -1)
        return cls(
            recent,
            embeds,
            (
                laid_out([each.rows.cosines for each in lessons]),
                laid_out([each.rows.sines for each in lessons]),
            ),
            torch.cat([before, among_new], dim=-1)[:, None],
            _stacked([each.counted[run] for each, run in zip(lessons, news, strict=True)]),
        )

    def stacked(self, lessons: Sequence[Lesson], kind: str, layer: int, packed: bool) -> Tensor:
        """``[B, P or R, G·D]`` of the exact pass."""
        parts = []
        for each in lessons:
            first = max(0, each.start - self.recent)
            outputs = (each.exact.keys if kind == "keys" else each.exact.values)[layer]
            parts.append(outputs[:first] if packed else outputs[first : each.start])
        return _stacked(parts)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(parts), batch_first=True)
