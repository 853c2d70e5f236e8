# SPDX-License-Identifier: Apache-2.0
"""Selection and compaction, the same for every method: which rows stay, and moving them together.

Selection is deterministic: the higher priority first, of equal ones the lower row, kept rows in ascending
order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.methods.prefill import Prefill
from starkv.methods.rows import ROW_FRAME


@dataclass(frozen=True)
class Kept:
    """A compacted cache."""

    keys: Tensor
    """``[L, B, M, K, D]`` for K the most rows of any layer; rows from ``kv_len`` on are zero. M is G, or H
    where every query head kept rows of its own (which needs H / G times the bytes)."""
    values: Tensor
    row_meta: Tensor | None
    """``[L, B, K, 4]`` int32, or None where the heads of a layer kept different rows."""
    rows: Tensor
    """``[L, B, N, K]`` int64: the row that each kept row had before, −1 behind ``kv_len``."""
    kv_len: Tensor
    """``[L, B]`` int64."""

    @property
    def bytes_held(self) -> Tensor:
        """Bytes of the valid rows of all layers and sequences (a scalar tensor)."""
        row_bytes = self.keys.shape[2] * self.keys.shape[4] * self.keys.element_size()
        return 2 * row_bytes * self.kv_len.sum()


def select_rows(priorities: Tensor, keep: Tensor, most: int) -> Tensor:
    """The ``keep`` best rows of each index set, in ascending order.

    Args:
        priorities: ``[L, B, N, C]`` f32 without NaN, see :meth:`Prefill.priorities`.
        keep: ``[L, B]`` rows to keep, at least 1 and at most the valid ones.
        most: largest value of ``keep``, known to the host so that no shape depends on data.

    Returns:
        ``[L, B, N, most]`` int64, −1 behind the ``keep`` first.
    """
    sets, capacity = priorities.shape[2], priorities.shape[3]
    best = priorities.topk(min(most, capacity), -1).values
    wanted = keep.long()[:, :, None, None].expand(-1, -1, sets, 1)
    cut = best.gather(-1, wanted - 1)
    above = priorities > cut
    at_cut = priorities == cut
    # Of the rows that tie at the cut the first ones fill what is left.
    left = wanted - above.sum(-1, keepdim=True)
    kept = above | (at_cut & (at_cut.cumsum(-1) <= left))
    place = torch.where(kept, kept.cumsum(-1) - 1, most)
    row = torch.arange(capacity, device=priorities.device).expand_as(place)
    # Rows that go land in one slot too many, which is cut off.
    rows = torch.full((*priorities.shape[:3], most + 1), -1, device=priorities.device)
    return rows.scatter_(-1, place, row)[..., :most]


def compact(prefill: Prefill, rows: Tensor, keep: Tensor) -> Kept:
    """Gather the chosen rows of keys, values and metadata.

    Args:
        prefill: the uncompressed cache.
        rows: ``[L, B, N, K]`` from :func:`select_rows`; N is 1 (one index set per layer), G, or H.
        keep: ``[L, B]`` valid ones of them.
    """
    groups, dim = prefill.keys.shape[2], prefill.keys.shape[4]
    sets = rows.shape[2]
    heads = max(groups, sets)
    index = rows.clamp(min=0).expand(-1, -1, heads, -1)
    padding = (rows < 0).expand_as(index)[..., None]

    def gather(cache: Tensor) -> Tensor:
        source = cache.repeat_interleave(sets // groups, 2) if sets > groups else cache
        picked = source.gather(3, index[..., None].expand(-1, -1, -1, -1, dim))
        return picked.masked_fill_(padding, 0.0)

    meta = None
    if sets == 1:
        picked = index[:, :, 0, :, None].expand(-1, -1, -1, prefill.row_meta.shape[-1])
        meta = prefill.row_meta.gather(2, picked)
        meta[..., ROW_FRAME].masked_fill_(rows[:, :, 0] < 0, -1)
    return Kept(gather(prefill.keys), gather(prefill.values), meta, rows, keep.long())
