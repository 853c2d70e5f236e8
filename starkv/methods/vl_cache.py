# SPDX-License-Identifier: Apache-2.0
"""VL-Cache (arXiv 2410.23317): the text behind the last screenshot scores the rest, and layers with sparse
attention keep fewer rows (docs/spec/baselines.md, VL-Cache)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.budget import LEAST_ROWS
from starkv.methods.method import Heads, per_index_set
from starkv.methods.prefill import Prefill
from starkv.methods.rows import Frame, PromptRows
from starkv.methods.snapkv import SnapKV
from starkv.methods.window import pool_scores

_NEGLIGIBLE = 0.01
_LEAST_SHARE = 0.001


@dataclass(frozen=True)
class VLCache(SnapKV):
    """SnapKV's scores from all text behind the last screenshot, with a budget for each layer.

    A layer's window is that text, or all but one row of its budget where that is less. Layers therefore have
    different windows: ``window_for`` names the one row that all keep, the rest comes as infinite scores.
    Budgets are shares of all layers, so all have to come in one call.

    Raises:
        UsageError: a field makes no sense.
    """

    name: ClassVar[str] = "vl_cache"
    window: int = 8
    """Used where there is no screenshot."""
    heads: Heads = "attention"
    layer_budgets: tuple[int, ...] | None = None
    """Rows of each layer, its window included; None: from ``Prefill.sparsity``, see :func:`with_sparsity`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_budgets is not None and min(self.layer_budgets, default=0) < LEAST_ROWS:
            raise UsageError(
                f"layer_budgets must be at least {LEAST_ROWS} rows each, not {self.layer_budgets}"
            )

    def window_for(self, prompt: PromptRows, kept_rows: int) -> int:
        return 1

    def queries_for(self, prompt: PromptRows, kept_rows: int) -> int:
        return min(prompt.length, _text_rows(prompt.newest_frame(1), self.window))

    def keep_rows(
        self, layers: int, prompt_rows: int, kept_rows: int, window: int, sparsity: Tensor | None = None
    ) -> tuple[int, ...]:
        if self.layer_budgets is None and kept_rows >= prompt_rows:
            # Shares of a whole budget would take rows from layers that nothing is to be taken from.
            return (prompt_rows,) * layers
        budgets = self._budgets(layers, kept_rows, sparsity)
        return tuple(min(prompt_rows, int(rows)) for rows in budgets.tolist())

    def score(self, prefill: Prefill, kept_rows: int) -> Tensor:
        budgets = self._budgets(len(prefill.keys), kept_rows, prefill.sparsity).to(prefill.keys.device)
        text = _text_rows(prefill.frame, min(self.window, prefill.queries.shape[3]))
        if self.layer_budgets is not None:
            text = min(text, max(self.layer_budgets) - 1)
        windows = (budgets - 1).clamp(max=text)
        query = torch.arange(text, device=budgets.device)
        counts = query >= text - windows[:, None]
        shares = _attention(prefill, text).mul_(counts[:, None, None, :, None])
        is_past = prefill.row < (prefill.kv_len - windows[:, None])[..., None]
        mass = shares.sum(-2).masked_fill_(~is_past[:, :, None], 0.0)
        pooled = pool_scores(mass, is_past, self.kernel, self.pooling)
        scores = per_index_set(pooled, self.heads, prefill.keys.shape[2])
        return scores.masked_fill(~is_past[:, :, None], torch.inf)

    def _budgets(self, layers: int, kept_rows: int, sparsity: Tensor | None) -> Tensor:
        """``[L]`` int64."""
        if self.layer_budgets is not None:
            if len(self.layer_budgets) != layers:
                raise UsageError(f"vl_cache has {len(self.layer_budgets)} layer budgets for {layers} layers")
            return torch.tensor(self.layer_budgets)
        if sparsity is None:
            raise UsageError(
                "vl_cache shares rows out by the layers' sparsity, which this prefill doesn't have; "
                "measure it with vl_cache.with_sparsity, or give layer_budgets"
            )
        if sparsity.shape != (layers,):
            raise UsageError(f"sparsity must be {(layers,)}, not {tuple(sparsity.shape)}")
        return shared_rows(sparsity, kept_rows)


def shared_rows(sparsity: Tensor, kept_rows: int) -> Tensor:
    """Share the rows of all layers out: the more of a layer's attention counts, the more rows it gets.

    Args:
        sparsity: ``[L]`` in [0, 1], see :func:`attention_sparsity`.
        kept_rows: mean rows of a layer.

    Returns:
        ``[L]`` int64, at least ``LEAST_ROWS`` each.
    """
    dense = 1.0 - sparsity.double()
    share = (dense / dense.sum().clamp(min=torch.finfo(torch.float64).tiny)).clamp(_LEAST_SHARE, 1.0)
    # As in budget.py: an exact share must not lose a row to binary fractions.
    rows = (kept_rows * len(sparsity) * share + 1e-9).long()
    return rows.clamp(min=LEAST_ROWS)


def attention_sparsity(prefill: Prefill, window: int = 8) -> Tensor:
    """Share of the attention weights behind the last screenshot that are negligible (0.01 or less).

    The official code measures this on a forward pass that hands every layer the embeddings; here it is the
    attention that the layers really have.

    Args:
        prefill: the cache, made with ``VLCache.window_for`` and ``VLCache.queries_for`` queries.
        window: queries to look at where there is no screenshot.

    Returns:
        ``[L]`` f32, mean over sequences and query heads.

    Raises:
        UsageError: the prefill has fewer queries.
    """
    text = _text_rows(prefill.frame, min(window, prefill.queries.shape[3]))
    negligible = (_attention(prefill, text) <= _NEGLIGIBLE) & _visible(prefill, text)
    seen = _visible(prefill, text).sum((-2, -1))
    return (negligible.sum((-2, -1)) / seen).mean((1, 2))


def with_sparsity(prefill: Prefill, window: int = 8) -> Prefill:
    """The same prefill with its sparsity measured; arguments as in :func:`attention_sparsity`."""
    return replace(prefill, sparsity=attention_sparsity(prefill, window))


def _text_rows(frame: Frame, without: int) -> int:
    """Rows behind the last screenshot."""
    return max(1, frame.rows_to_end - frame.cells) if frame.cells else without


def _visible(prefill: Prefill, count: int) -> Tensor:
    """``[L, B, 1, count, C]`` bool: rows that each of the last queries sees."""
    query = torch.arange(count, device=prefill.keys.device)[:, None]
    first = (prefill.kv_len - count)[..., None, None]
    return (prefill.row <= first + query)[:, :, None]


def _attention(prefill: Prefill, count: int) -> Tensor:
    """``[L, B, H, count, C]`` f32: attention weights of the last queries.

    Not summed as in ``window.py``, since layers count different ones of them.
    """
    layers, batch, heads, held, dim = prefill.queries.shape
    groups, capacity = prefill.keys.shape[2], prefill.keys.shape[3]
    if count > held:
        raise UsageError(
            f"vl_cache asks the {count} queries behind the last screenshot, but this prefill holds {held}"
        )
    grouped = prefill.queries[:, :, :, held - count :].float().reshape(layers, batch, groups, -1, dim)
    scores = torch.matmul(grouped, prefill.keys.float().transpose(-1, -2)).div_(math.sqrt(dim))
    scores = scores.view(layers, batch, heads, count, capacity)
    return scores.masked_fill_(~_visible(prefill, count), -torch.inf).softmax(-1)
