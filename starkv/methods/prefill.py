# SPDX-License-Identifier: Apache-2.0
"""What a prefill leaves for the methods to score, as tensors.

Symbols: L layers, B sequences, C rows of capacity, G KV heads, H = r · G query heads, W window, D head dim. A
query head h reads KV head h // r.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.errors import UsageError
from starkv.methods.rows import ROW_FRAME, ROW_PROTECTED, Frame, PromptRows


@dataclass(frozen=True)
class Prefill:
    """The cache of B prefilled sequences and their last queries.

    Layers and sequences are leading dimensions everywhere: an engine may hand over all layers or one at a
    time (L = 1), with the same result.
    """

    keys: Tensor
    """``[L, B, G, C, D]`` after rotation, any float dtype; rows from ``kv_len`` on are never read."""
    values: Tensor
    """``[L, B, G, C, D]``."""
    queries: Tensor
    """``[L, B, H, R, D]`` after rotation: the last R ≥ W queries."""
    hidden_norm: Tensor | None
    """``[L, B, C]`` f32: L2 norm of each row's attention input, or None to skip what is made of it."""
    kv_len: Tensor
    """``[L, B]`` integer: valid rows."""
    row_meta: Tensor
    """``[L, B, C, 4]`` int32, see ``rows.py``."""
    frame: Frame
    """The newest screenshot, the same in all layers and sequences."""
    window: int
    """W: the last rows, whose attention scores the others."""
    attention_sums: Tensor | None = None
    """``[L, B, H, C]`` f32: attention that each row got from all queries of the prefill; for H2O."""
    sparsity: Tensor | None = None
    """``[L]`` f32: share of the attention behind the last screenshot that is negligible; for VL-Cache."""

    def __post_init__(self) -> None:
        layers, batch, groups, capacity, dim = self.keys.shape
        if self.values.shape != self.keys.shape:
            raise UsageError(f"values {tuple(self.values.shape)} and keys {tuple(self.keys.shape)} differ")
        if self.queries.shape[:2] != (layers, batch) or self.queries.shape[4] != dim:
            raise UsageError(
                f"queries {tuple(self.queries.shape)} don't fit keys {tuple(self.keys.shape)}: "
                "[L, B, H, R, D] and [L, B, G, C, D]"
            )
        if self.queries.shape[2] % groups:
            raise UsageError(f"{self.queries.shape[2]} query heads can't share {groups} KV heads evenly")
        if not 1 <= self.window <= self.queries.shape[3]:
            raise UsageError(
                f"a window of {self.window} queries is asked for, but {self.queries.shape[3]} are there"
            )
        if self.window >= capacity + 1:
            raise UsageError(f"the window of {self.window} rows is longer than the cache of {capacity}")
        for name, shape in (("kv_len", (layers, batch)), ("row_meta", (layers, batch, capacity, 4))):
            if getattr(self, name).shape != shape:
                raise UsageError(f"{name} must be {shape}, not {tuple(getattr(self, name).shape)}")
        if self.hidden_norm is not None and self.hidden_norm.shape != (layers, batch, capacity):
            raise UsageError(
                f"hidden_norm must be {(layers, batch, capacity)}, not {tuple(self.hidden_norm.shape)}"
            )

    @classmethod
    def of_prompt(
        cls,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        rows: PromptRows,
        window: int,
        hidden_norm: Tensor | None = None,
        protect: Sequence[int] = (),
    ) -> "Prefill":
        """A prompt that fills its cache exactly, the same in every layer.

        Args:
            keys: ``[L, B, G, S, D]``.
            values: ``[L, B, G, S, D]``.
            queries: ``[L, B, H, R, D]``.
            rows: metadata of the S rows.
            window: W.
            hidden_norm: ``[L, B, S]``.
            protect: rows that may not be evicted, see :meth:`PromptRows.protected`.

        Raises:
            UsageError: shapes don't fit.
        """
        layers, batch, _, length, _ = keys.shape
        if rows.length != length:
            raise UsageError(f"metadata of {rows.length} rows for a cache of {length}")
        meta = torch.from_numpy(rows.marked(protect)).to(keys.device)
        return cls(
            keys=keys,
            values=values,
            queries=queries,
            hidden_norm=hidden_norm,
            kv_len=torch.full((layers, batch), length, device=keys.device),
            row_meta=meta.expand(layers, batch, -1, -1),
            frame=rows.newest_frame(window),
            window=window,
        )

    @property
    def window_queries(self) -> Tensor:
        """``[L, B, H, W, D]``."""
        return self.queries[:, :, :, self.queries.shape[3] - self.window :]

    @property
    def row(self) -> Tensor:
        """``[C]``: 0 … C − 1."""
        return torch.arange(self.keys.shape[3], device=self.keys.device)

    @property
    def past(self) -> Tensor:
        """``[L, B]``: rows before the window, which compete."""
        return self.kv_len - self.window

    @property
    def is_past(self) -> Tensor:
        """``[L, B, C]`` bool."""
        return self.row < self.past[..., None]

    @property
    def frame_start(self) -> Tensor:
        """``[L, B]``: first row of the newest screenshot."""
        return self.kv_len - self.frame.rows_to_end

    @property
    def in_frame(self) -> Tensor:
        """``[L, B, C]`` bool: the newest screenshot's rows that compete."""
        offset = self.row - self.frame_start[..., None]
        return (offset >= 0) & (offset < self.frame.cells)

    @property
    def row_frame(self) -> Tensor:
        """``[L, B, C]``."""
        return self.row_meta[..., ROW_FRAME]

    @property
    def is_protected(self) -> Tensor:
        """``[L, B, C]`` bool."""
        return self.row_meta[..., ROW_PROTECTED] > 0

    def priorities(self, scores: Tensor) -> Tensor:
        """Mark rows whose fate does not depend on their score.

        Args:
            scores: ``[L, B, N, C]`` for N index sets per layer.

        Returns:
            ``[L, B, N, C]`` f32: +inf in the window, the largest finite number where protected, −inf where
            there is no row and where a score is not a number.
        """
        finite = torch.nan_to_num(scores.float(), nan=-torch.inf)
        # A row that competes never beats one that may not be evicted, whatever its score.
        limits = torch.finfo(torch.float32)
        finite = finite.clamp(max=limits.max / 2)
        held = torch.where((self.is_protected & self.is_past)[:, :, None], limits.max, finite)
        in_window = torch.where(self.is_past[:, :, None], held, torch.inf)
        valid = (self.row < self.kv_len[..., None])[:, :, None]
        return torch.where(valid, in_window, -torch.inf)
