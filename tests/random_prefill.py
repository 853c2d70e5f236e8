# SPDX-License-Identifier: Apache-2.0
"""Prefills of random numbers, with two screenshots in between text."""

from dataclasses import replace

import numpy as np
import torch

from starkv.methods.method import KvMethod
from starkv.methods.prefill import Prefill
from starkv.methods.rows import PromptRows, prompt_rows
from starkv.methods.vl_cache import with_sparsity

LENGTH = 90
DIM = 40
"""More than the rank of GUI-KV: otherwise every key lies in the span and residuals are rounding noise."""


def two_screenshots(length: int = LENGTH, protect: tuple[int, ...] = ()) -> PromptRows:
    """Text, 24 tokens, text, 36 tokens, 15 rows of text; a shorter prompt has less text in front."""
    start = length - 83
    return prompt_rows(length, [(start, start + 24), (start + 32, start + 68)], [(4, 6), (4, 9)], protect)


def random_prefill(
    window: int,
    *,
    rows: PromptRows | None = None,
    layers: int = 3,
    batch: int = 1,
    groups: int = 2,
    repeats: int = 3,
    agree: bool = False,
    seed: int = 0,
) -> Prefill:
    """A prefill with all that any method asks for; with ``agree`` the query heads of a KV head are equal."""
    rows = rows or two_screenshots()
    length, random = rows.length, np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal((layers, batch, *shape)).astype(np.float32))

    def heads(*shape: int) -> torch.Tensor:
        made = normal(groups if agree else groups * repeats, *shape)
        return made.repeat_interleave(repeats, 2) if agree else made

    prefill = Prefill.of_prompt(
        keys=normal(groups, length, DIM),
        values=normal(groups, length, DIM),
        queries=2.0 * heads(min(32, length), DIM),
        rows=rows,
        window=window,
        hidden_norm=normal(length).abs(),
    )
    return with_sparsity(replace(prefill, attention_sums=heads(length).abs()))


def prefill_for(method: KvMethod, kept_rows: int, **options: object) -> Prefill:
    """A random prefill with the window that a method wants."""
    rows = options.get("rows") or two_screenshots()
    assert isinstance(rows, PromptRows)
    return random_prefill(method.window_for(rows, kept_rows), **options)  # type: ignore[arg-type]


def ragged(prefill: Prefill, lengths: list[int]) -> Prefill:
    """Sequences cut at the front to these lengths, with rubbish behind them."""

    def shift(tensor: torch.Tensor, axis: int, blank: float) -> torch.Tensor:
        shifted = torch.full_like(tensor, blank)
        for sequence, length in enumerate(lengths):
            source = tensor[:, sequence].narrow(axis - 1, tensor.shape[axis] - length, length)
            shifted[:, sequence].narrow(axis - 1, 0, length).copy_(source)
        return shifted

    assert prefill.hidden_norm is not None
    assert prefill.attention_sums is not None
    return replace(
        prefill,
        keys=shift(prefill.keys, 3, torch.nan),
        values=shift(prefill.values, 3, torch.nan),
        hidden_norm=shift(prefill.hidden_norm, 2, 1e6),
        attention_sums=shift(prefill.attention_sums, 3, torch.nan),
        row_meta=shift(prefill.row_meta, 2, 0),
        kv_len=torch.tensor(lengths).expand(len(prefill.keys), -1),
    )


def one_sequence(prefill: Prefill, sequence: int) -> Prefill:
    """One sequence of a ragged batch, alone and without rows behind it."""
    assert prefill.hidden_norm is not None
    assert prefill.attention_sums is not None
    one, length = slice(sequence, sequence + 1), int(prefill.kv_len[0, sequence])
    return replace(
        prefill,
        keys=prefill.keys[:, one, :, :length],
        values=prefill.values[:, one, :, :length],
        queries=prefill.queries[:, one],
        hidden_norm=prefill.hidden_norm[:, one, :length],
        attention_sums=prefill.attention_sums[:, one, :, :length],
        row_meta=prefill.row_meta[:, one, :length],
        kv_len=prefill.kv_len[:, one],
    )
