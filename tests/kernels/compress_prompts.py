# SPDX-License-Identifier: Apache-2.0
"""Random prompts with screenshots, as trajectories: what the cases of ``compress_cases.py`` are made of."""

from dataclasses import dataclass, replace

import torch
from kv_cases import padded

from starkv.methods.prefill import Prefill
from starkv.methods.rows import PromptRows, official_rows, prompt_rows
from starkv.methods.star_kv_config import StarKVConfig

NATIVE = StarKVConfig()
TEXT_ROWS = 5
"""Rows of text before each screenshot."""
TAIL_ROWS = 12
"""Rows of text behind the newest screenshot; a wider window reaches into the screenshot."""
_PER_SEQUENCE = ("keys", "values", "queries", "hidden_norm", "kv_len", "row_meta")

Grids = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prompt:
    """One call's input, on the CPU."""

    prefill: Prefill
    kept_rows: int
    """Rows per layer on average, the window included."""
    length: int
    """Rows of the shortest sequence."""
    protected: int
    """Rows that may not be evicted."""


@dataclass(frozen=True)
class Case:
    """A trajectory: prompts whose compression hands its state to the next."""

    name: str
    config: StarKVConfig = NATIVE
    prompts: tuple[Grids, ...] = (((7, 9),), ((7, 9), (7, 9)), ((7, 9), (7, 9), (7, 9)))
    """Rows and columns of the screenshots in each prompt, the newest one last."""
    layers: int = 2
    batch: int = 1
    groups: int = 2
    sharing: int = 2
    """Query heads per KV head."""
    dim: int = 64
    dtype: torch.dtype = torch.float32
    share: float = 0.4
    """Part of the rows to keep."""
    protect: bool = False
    """Mark the first rows of the prompt as not to be evicted."""
    ragged: bool = False
    """Layers and sequences lack some of the first rows, each other ones."""
    spare_rows: int = 0
    """Capacity behind the longest sequence, full of NaN like every row that is none."""
    tied: bool = False
    """All rows look alike, so that nothing but their order decides."""
    tied_groups: bool = False
    """Each KV head attends evenly to a half of each screenshot of its own, so that all score the same where
    the halves overlap, but not with the same weight."""
    hidden_norm: bool = True
    seed: int = 0

    def prompt(self, index: int) -> Prompt:
        """The ``index``-th prompt of the trajectory."""
        rows = _layout(self.prompts[index])
        window = self.config.window
        prefill = self._random_prefill(rows, self.seed + 1000 * index)
        if self.ragged:
            prefill = _without_first_rows(prefill)
        if self.spare_rows:
            prefill = padded(prefill, self.spare_rows, torch.nan)
        length = int(prefill.kv_len.min())
        kept_rows = max(window + 2, int(self.share * length))
        protect = rows.protected(kept_rows, window) if self.protect else ()
        meta = prefill.row_meta.clone()
        for row in protect:
            meta[..., 2] |= (meta[..., 3] == row).int()
        return Prompt(replace(prefill, row_meta=meta), kept_rows, length, len(protect))

    def _random_prefill(self, rows: PromptRows, seed: int) -> Prefill:
        random = torch.Generator().manual_seed(seed)

        def draw(*dims: int) -> torch.Tensor:
            return torch.randn(self.layers, self.batch, *dims, generator=random)

        keys = draw(self.groups, rows.length, self.dim)
        values = draw(self.groups, rows.length, self.dim)
        queries = draw(self.groups * self.sharing, self.config.window, self.dim) * 1.5
        norm = 1.0 + draw(rows.length).abs()
        if self.tied:
            # Products of these are exact, whatever the order of their sum.
            keys, queries, norm = torch.full_like(keys, 0.5), queries.round(), torch.ones_like(norm)
        if self.tied_groups:
            keys, queries = self._halves(rows, keys, random), torch.zeros_like(queries)
            queries[..., 0] = 64.0
        window = self.config.window
        official = self.config.is_official
        return Prefill.of_prompt(
            keys=keys.to(self.dtype),
            values=values.to(self.dtype),
            queries=queries.to(self.dtype),
            rows=official_rows(rows.length, rows.spans, window) if official else rows,
            window=window,
            hidden_norm=norm if self.hidden_norm else None,
        )

    def _halves(self, rows: PromptRows, keys: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Keys whose first number hides a random half of each screenshot from a query that is 64 there: the
        exponential of their product is exactly 0, elsewhere it is 1."""
        halves = torch.zeros_like(keys)
        for heads in halves.flatten(0, 2):
            for start, end in rows.spans:
                hidden = start + torch.randperm(end - start, generator=random)[: (end - start) // 2]
                heads[hidden, 0] = -self.dim
        return halves


def _layout(grids: Grids) -> PromptRows:
    """Text, then screenshots with text before each, then text."""
    spans, row = [], 4
    for rows, columns in grids:
        row += TEXT_ROWS
        spans.append((row, row + rows * columns))
        row += rows * columns
    # Without a screenshot there is more text, so that something competes.
    length = row + TAIL_ROWS + (0 if grids else 60)
    return prompt_rows(length, spans, grids, tuple(range(4)))


def _without_first_rows(prefill: Prefill) -> Prefill:
    """Each layer and sequence without some of its first rows; NaN behind the last one that is left."""
    layers, batch = prefill.kv_len.shape
    parts = {name: getattr(prefill, name).clone() for name in _PER_SEQUENCE if name != "queries"}
    for layer in range(layers):
        for sequence in range(batch):
            missing = (2 * layer + 3 * sequence) % TEXT_ROWS
            length = int(prefill.kv_len[layer, sequence]) - missing
            for name, dim in (("keys", 1), ("values", 1), ("hidden_norm", 0), ("row_meta", 0)):
                one = parts[name][layer, sequence]
                moved = one.narrow(dim, missing, length).clone()
                one.fill_(9 if name == "row_meta" else torch.nan)
                one.narrow(dim, 0, length).copy_(moved)
            parts["kv_len"][layer, sequence] = length
    return replace(prefill, **parts)
