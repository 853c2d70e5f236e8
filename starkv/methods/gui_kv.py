# SPDX-License-Identifier: Apache-2.0
"""GUI-KV (arXiv 2510.00536): SnapKV, a boost for the newest screenshot's salient tokens, and no tokens of
older screenshots whose keys the newest one spans (docs/spec/baselines.md, GUI-KV)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.prefill import Prefill
from starkv.methods.snapkv import SnapKV
from starkv.methods.window import hidden_norm_boost


@dataclass(frozen=True)
class GuiKV(SnapKV):
    """SnapKV's scores with GUI-KV's two steps on top.

    Without hidden norms both steps are skipped, as in the official code. Keys belong to KV heads, so
    redundancy is worked out once per KV head in either form.

    Raises:
        UsageError: a field makes no sense.
    """

    name: ClassVar[str] = "gui_kv"
    boost: float = 2.0
    """Mass that is spread over the newest screenshot (``alpha``); 0 turns it off."""
    boost_temperature: float = 3.5
    rank: int = 32
    """First tokens of the newest screenshot whose keys span what counts as redundant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boost_temperature <= 0:
            raise UsageError(f"boost_temperature must be above 0, not {self.boost_temperature}")
        if self.rank < 1:
            raise UsageError(f"rank must be at least 1, not {self.rank}")

    def score(self, prefill: Prefill, kept_rows: int) -> Tensor:
        scores = super().score(prefill, kept_rows)
        if prefill.hidden_norm is None or not prefill.frame.cells:
            return scores
        boost = hidden_norm_boost(prefill.hidden_norm, prefill.in_frame, self.boost, self.boost_temperature)
        scores = scores + boost[:, :, None]
        if prefill.frame.frames_in_view < 2:
            return scores
        redundant = redundant_rows(prefill, frame_residuals(prefill, self.rank), kept_rows)
        return scores.masked_fill(redundant.repeat_interleave(scores.shape[2] // redundant.shape[2], 2), 0.0)


def frame_residuals(prefill: Prefill, rank: int) -> Tensor:
    """How far each key lies outside the span of the newest screenshot's first keys.

    The official code takes the first columns of an unpivoted QR decomposition of all its keys, which span the
    same as those first keys: the top left of the screen, not the leading directions.

    Args:
        prefill: has a newest screenshot.
        rank: most keys that span.

    Returns:
        ``[L, B, G, C]`` f32, length of the part of each key that is orthogonal to them.
    """
    keys = prefill.keys.float()
    _, _, groups, _, dim = keys.shape
    first = torch.arange(min(rank, prefill.frame.cells, dim), device=keys.device)
    rows = (prefill.frame_start[..., None].long() + first)[:, :, None, :, None]
    spanning = keys.gather(3, rows.expand(-1, -1, groups, -1, dim))
    basis = torch.linalg.qr(spanning.transpose(-1, -2)).Q
    inside = torch.matmul(torch.matmul(keys, basis), basis.transpose(-1, -2))
    residuals: Tensor = (keys - inside).norm(dim=-1)
    return residuals


def redundant_rows(prefill: Prefill, residuals: Tensor, kept_rows: int) -> Tensor:
    """Rows of older screenshots that the newest one shows again.

    Those with the smallest residuals, as large a share of them as the budget evicts of the prompt; of equal
    residuals the lower row goes first.

    Args:
        prefill: the cache.
        residuals: ``[L, B, G, C]``, see :func:`frame_residuals`.
        kept_rows: rows per layer that the budget keeps.

    Returns:
        ``[L, B, G, C]`` bool.
    """
    frame_of = prefill.row_frame
    history = prefill.is_past & (frame_of >= 0) & (frame_of < prefill.frame.index)
    # In float64 and in this order, as Python would: rounding down must fall on the same side as there.
    share = 1.0 - kept_rows / prefill.kv_len.double()
    evicted = (share * history.sum(-1)).long()
    order = residuals.masked_fill(~history[:, :, None], torch.inf).argsort(dim=-1, stable=True)
    goes = (prefill.row < evicted[..., None])[:, :, None].expand_as(order)
    return torch.zeros_like(goes, dtype=torch.bool).scatter_(-1, order, goes)
