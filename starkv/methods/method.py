# SPDX-License-Identifier: Apache-2.0
"""What a compression method without memory is: one pure score function and two numbers known to the host.

Symbols as in ``prefill.py``. STaR-KV remembers a trajectory and therefore is no ``KvMethod``; ``registry.py``
knows both kinds.
"""

from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.budget import window_rows
from starkv.methods.prefill import Prefill
from starkv.methods.rows import PromptRows
from starkv.methods.select import Kept, compact, select_rows
from starkv.methods.star_kv_stages import group_scores

IndexSets = Literal["layer", "kv_head", "attention_head"]
"""Who chooses rows of its own: each layer, each KV head, or each query head. The last needs H / G times the
bytes, since keys and values of a KV head are stored once for each of its query heads."""
Heads = Literal["kv", "attention"]
"""``kv``: one index set per KV head, scores averaged over its query heads. ``attention``: one per query head,
the form of the papers' code."""


class KvMethod(Protocol):
    """A method that chooses rows from one prefill alone.

    Implementations are frozen dataclasses that inherit from it; their fields are the hyper-parameters.
    """

    name: ClassVar[str]
    window: int
    """Rows at the end of the prompt that are always kept; a small budget makes them fewer."""

    @property
    def index_sets(self) -> IndexSets:
        return "layer"

    def window_for(self, prompt: PromptRows, kept_rows: int) -> int:
        """``Prefill.window`` of this method: last rows that every layer keeps whatever their score."""
        return window_rows(self.window, kept_rows)

    def queries_for(self, prompt: PromptRows, kept_rows: int) -> int:
        """How many of the last queries ``score`` reads: what an engine's observation window has to hold."""
        return self.window_for(prompt, kept_rows)

    def keep_rows(
        self, layers: int, prompt_rows: int, kept_rows: int, window: int, sparsity: Tensor | None = None
    ) -> tuple[int, ...]:
        """Rows that each layer keeps, on the host.

        Args:
            layers: L.
            prompt_rows: rows of the prompt.
            kept_rows: rows to keep per layer on average, the window included.
            window: see :meth:`window_for`.
            sparsity: ``Prefill.sparsity``; only VL-Cache asks for it (and waits for the device).
        """
        return (min(prompt_rows, kept_rows),) * layers

    def score(self, prefill: Prefill, kept_rows: int) -> Tensor:
        """How much each row is worth keeping.

        Returns:
            ``[L, B, N, C]`` f32, N being 1, G or H as ``index_sets`` says. What it holds in the window and
            behind the valid rows means nothing.

        Raises:
            UsageError: the prefill lacks something that the method needs.
        """
        ...


def index_sets_of(heads: Heads) -> IndexSets:
    """Index sets of a method that comes in both forms."""
    return "kv_head" if heads == "kv" else "attention_head"


def check_heads(heads: str) -> None:
    """Refuse an unknown form.

    Raises:
        UsageError: neither ``kv`` nor ``attention``.
    """
    if heads not in ("kv", "attention"):
        raise UsageError(f"heads must be kv or attention, not {heads!r}")


def per_index_set(scores: Tensor, heads: Heads, groups: int) -> Tensor:
    """Scores of query heads as the form wants them: ``[L, B, H, C]`` → ``[L, B, G or H, C]``."""
    return group_scores(scores, groups) if heads == "kv" else scores


def compress_with(
    method: KvMethod, prefill: Prefill, rows: int, length: int, protected: int = 0
) -> Kept | None:
    """Score and compact a prompt's cache.

    Args:
        method: which rows to keep.
        prefill: the cache, made with ``method.window_for``. Sequences may be shorter than ``length``.
        rows: rows per layer to keep on average, the window included (the official ``capacity``).
        length: rows of the longest sequence, ``kv_len`` as the host knows it.
        protected: how many rows of ``row_meta`` may not be evicted.

    Returns:
        the compacted cache, or None where the prompt is shorter than ``rows`` and stays as it is.

    Raises:
        UsageError: a layer keeps fewer rows than the window and the protected rows have, or the prefill lacks
            something that the method needs.
    """
    if length < rows:
        return None
    return keep_best(method, prefill, method.score(prefill, rows), rows, length, protected)


def keep_best(
    method: KvMethod, prefill: Prefill, scores: Tensor, rows: int, length: int, protected: int = 0
) -> Kept:
    """Give every layer its budget and keep the best rows; arguments as in :func:`compress_with`.

    Args:
        scores: ``[L, B, N, C]`` from ``method.score``.
    """
    window = prefill.window
    keep = method.keep_rows(len(prefill.keys), length, rows, window, prefill.sparsity)
    least = min(keep)
    if least < min(length, window + protected):
        raise UsageError(
            f"{method.name}: a layer would keep {least} rows, which can't hold a window of {window} and "
            f"{protected} protected ones; use a larger budget or a smaller window"
        )
    wanted = torch.tensor(keep, device=prefill.keys.device)[:, None].minimum(prefill.kv_len)
    chosen = select_rows(prefill.priorities(scores), wanted, max(keep))
    return compact(prefill, chosen, wanted)
