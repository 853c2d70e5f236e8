# SPDX-License-Identifier: Apache-2.0
"""Random prompts with screenshots, whose caches the compression tests score."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from starkv.methods.prefill import Prefill
from starkv.methods.rows import PromptRows, official_rows, prompt_rows

GAP = 6
"""Rows of text before each screenshot."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a random cache."""

    layers: int = 3
    batch: int = 1
    groups: int = 2
    sharing: int = 3
    """Query heads per KV head."""
    dim: int = 16


def layout(grids: Sequence[tuple[int, int]], tail: int = 12) -> PromptRows:
    """Text, then screenshots with text before each, then ``tail`` rows of text."""
    spans, row = [], 0
    for rows, columns in grids:
        row += GAP
        spans.append((row, row + rows * columns))
        row += rows * columns
    return prompt_rows(row + tail, spans, grids, tuple(range(4)))


def random_prefill(
    rows: PromptRows,
    window: int = 8,
    shape: Shape | None = None,
    seed: int = 0,
    official: bool = False,
    protect: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Prefill:
    """A cache of random keys that attention finds uneven, with that layout."""
    sizes = shape or Shape()
    random = torch.Generator().manual_seed(seed)
    lead = (sizes.layers, sizes.batch)

    def draw(*dims: int) -> torch.Tensor:
        return torch.randn(*lead, *dims, generator=random)

    length = rows.length
    keys = draw(sizes.groups, length, sizes.dim) * 1.5
    return Prefill.of_prompt(
        keys=keys.to(dtype),
        values=draw(sizes.groups, length, sizes.dim).to(dtype),
        queries=draw(sizes.groups * sizes.sharing, window, sizes.dim).to(dtype),
        rows=official_rows(length, rows.spans, window) if official else rows,
        window=window,
        hidden_norm=1.0 + draw(length).abs(),
        protect=protect,
    )


_PER_SEQUENCE = ("keys", "values", "queries", "hidden_norm", "kv_len", "row_meta")


def part(prefill: Prefill, layer: slice = slice(None), sequence: slice = slice(None)) -> Prefill:
    """Some layers and sequences of a cache."""
    return replace(prefill, **{name: getattr(prefill, name)[layer, sequence] for name in _PER_SEQUENCE})


def joined(parts: Sequence[Prefill]) -> Prefill:
    """Sequences of equal capacity as one batch; the rest is the last one's."""
    names = {name: torch.cat([getattr(one, name) for one in parts], 1) for name in _PER_SEQUENCE}
    return replace(parts[-1], **names)


def repeated_heads(prefill: Prefill) -> Prefill:
    """The same cache with one copy of each KV head per query head, as the official code stores it."""
    sharing = prefill.queries.shape[2] // prefill.keys.shape[2]
    return replace(
        prefill,
        keys=prefill.keys.repeat_interleave(sharing, 2),
        values=prefill.values.repeat_interleave(sharing, 2),
    )


def padded(prefill: Prefill, extra: int, garbage: float) -> Prefill:
    """The same cache in a larger buffer whose last rows hold garbage."""

    def pad(tensor: torch.Tensor, dim: int, value: float) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[dim] = extra
        return torch.cat([tensor, torch.full(shape, value, dtype=tensor.dtype)], dim)

    norm = prefill.hidden_norm
    return replace(
        prefill,
        keys=pad(prefill.keys, 3, garbage),
        values=pad(prefill.values, 3, garbage),
        hidden_norm=None if norm is None else pad(norm, 2, garbage),
        row_meta=pad(prefill.row_meta, 2, 9),
    )
