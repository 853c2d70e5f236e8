# SPDX-License-Identifier: Apache-2.0
"""Compression in the reference engine: the pure functions of ``starkv.methods`` on a prefilled arena."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from starkv.errors import UsageError
from starkv.manifest import TextShape
from starkv.methods import star_kv
from starkv.methods.h2o import H2O
from starkv.methods.method import KvMethod, keep_best
from starkv.methods.names import RANDOM, STAR_KV
from starkv.methods.oracle import Oracle
from starkv.methods.prefill import Prefill
from starkv.methods.registry import FORMS, make_method
from starkv.methods.rows import ROW_COLUMNS, PromptRows
from starkv.methods.select import Kept
from starkv.methods.star_kv import StarKVScores
from starkv.methods.star_kv_plan import StarKVProgress, skipped_call
from starkv.methods.star_kv_request import StarKVRequest, request_star_kv
from starkv.methods.star_kv_state import StarKVState
from starkv.methods.stream_rows import CacheRows
from starkv.methods.vl_cache import VLCache, with_sparsity
from starkv.runtime.engines.torch_decoder import attention_sums
from starkv.runtime.kv.buffers import Arena, KvBuffers
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory, whole_prompt

PER_HEAD = "_per_head"
"""Ends the names of forms in which every query head keeps rows of its own, for H / G times the bytes, as in
the papers' code: ``snapkv_per_head``. A plain name means what it means in every engine."""
_FORMS = {
    form.name + (PER_HEAD if form.index_sets == "attention_head" else ""): form
    for form in FORMS
    if form.name != Oracle.name
}
REFERENCE_METHODS = tuple(_FORMS)


@dataclass
class ReferenceArena(Arena):
    """Also remembers every query: some methods ask how much attention each row got from all others."""

    queries: NDArray[np.float32]
    """``[L, 1, H, C, D]`` after rotation."""

    @classmethod
    def allocate(cls, text: TextShape, rows: int) -> "ReferenceArena":
        plain = Arena.allocate(text, rows)
        queries = np.zeros((text.layers, 1, text.heads, plain.kv.capacity, text.head_dim), np.float32)
        return cls(plain.kv, plain.q_window, plain.hidden_norm, queries)


def cached_heads(method: str, text: TextShape) -> int:
    """Heads that a method stores rows for."""
    return text.kv_heads * _FORMS[method].bytes_factor(text.heads, text.kv_heads)


def most_kept_rows(text: TextShape, prompt_rows: int, policy: KvPolicy) -> int:
    """See :meth:`Engine.most_kept_rows`."""
    # What the prompt is made of does not change the bound.
    return most_rows_of(text, PromptRows(np.zeros((prompt_rows, ROW_COLUMNS), np.int32), (), ()), policy)


def most_rows_of(text: TextShape, rows: CacheRows, policy: KvPolicy) -> int:
    """See :meth:`Engine.most_rows_of`."""
    if policy.keeps_all_of(rows):
        return rows.length
    if policy.method == STAR_KV:
        return _request(rows, policy, StarKVProgress()).most_rows
    prompt = whole_prompt(rows, policy)
    method, kept = _method_of(policy), policy.kept_of(prompt)
    if isinstance(method, VLCache):
        # How it divides the rows is known only when the attention is.
        return min(prompt.length, text.layers * kept)
    return max(method.keep_rows(text.layers, prompt.length, kept, method.window_for(prompt, kept)))


def compress(
    arena: ReferenceArena,
    kv: KvBuffers,
    slot: int,
    prompt: CacheRows,
    policy: KvPolicy,
    memory: StarKVMemory | None,
) -> Compressed:
    """Copy the rows that a policy chooses from an arena into a slot; see :meth:`Engine.compress`.

    Raises:
        UsageError: the budget is too small for the method, or the slot for the budget.
    """
    if policy.method == STAR_KV:
        kept, compressed = _star_kv(arena, prompt, policy, memory)
    elif policy.keeps_all_of(prompt):
        kept = _all_rows(arena, prompt, policy.method)
        compressed = Compressed(_rows_of(kept), memory=memory)
    else:
        kept, compressed = _baseline(arena, whole_prompt(prompt, policy), policy, memory)
    _store(kept, kv, slot, policy.method)
    return compressed


def _request(prompt: CacheRows, policy: KvPolicy, progress: StarKVProgress) -> StarKVRequest:
    # The arena holds all queries, so a window may be as long as it likes.
    kept, window = policy.kept_of(prompt), policy.star_kv.window
    return request_star_kv(policy.star_kv, prompt, kept, progress, observation_window=window)


def _star_kv(
    arena: ReferenceArena, prompt: CacheRows, policy: KvPolicy, memory: StarKVMemory | None
) -> tuple[Kept, Compressed]:
    layers, _, groups = arena.host_kv.keys.shape[:3]
    memory = memory or StarKVMemory.initial(layers, groups)
    if policy.keeps_all_of(prompt):
        kept = _all_rows(arena, prompt, STAR_KV)
        memory = replace(memory, progress=skipped_call(policy.star_kv, memory.progress))
        return kept, Compressed(_rows_of(kept), memory=memory)
    request = _request(prompt, policy, memory.progress)
    prefill = _prefill_of(arena, request)
    scores, after = star_kv.score(prefill, _state_of(memory), policy.star_kv)
    kept = star_kv.keep_best(prefill, scores, request.limits)
    compressed = Compressed(_rows_of(kept), scores.final.numpy(), _stages_of(scores), _memory_of(after))
    return kept, compressed


def _method_of(policy: KvPolicy) -> KvMethod:
    form = _FORMS[policy.method]
    parameters: dict[str, object] = {}
    if form.index_sets != "layer":
        parameters["heads"] = "kv" if form.index_sets == "kv_head" else "attention"
    if form.name == RANDOM:
        parameters["seed"] = policy.seed
    return cast(KvMethod, make_method(form.name, **parameters))


def _baseline(
    arena: ReferenceArena, prompt: PromptRows, policy: KvPolicy, memory: StarKVMemory | None
) -> tuple[Kept, Compressed]:
    method, kept_rows = _method_of(policy), policy.kept_rows(prompt.length)
    prefill = _prefill(arena, prompt, method.window_for(prompt, kept_rows))
    if isinstance(method, H2O):
        prefill = replace(prefill, attention_sums=attention_sums(prefill.queries, prefill.keys))
    if isinstance(method, VLCache):
        prefill = with_sparsity(prefill, method.window)
    scores = method.score(prefill, kept_rows)
    kept = keep_best(method, prefill, scores, kept_rows, prompt.length)
    return kept, Compressed(_rows_of(kept), scores[:, 0].numpy(), memory=memory)


def _prefill(arena: ReferenceArena, rows: PromptRows, window: int, protect: Sequence[int] = ()) -> Prefill:
    """The arena as the methods see it, without a copy."""

    def valid(cache: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(cache[:, :, :, : rows.length])

    return Prefill.of_prompt(
        keys=valid(arena.host_kv.keys),
        values=valid(arena.host_kv.values),
        queries=valid(arena.queries),
        rows=rows,
        window=window,
        hidden_norm=torch.from_numpy(arena.hidden_norm[:, :, : rows.length]),
        protect=protect,
    )


def _prefill_of(arena: ReferenceArena, request: StarKVRequest) -> Prefill:
    """The arena with layers of different lengths."""
    rows = request.prompt
    if isinstance(rows, PromptRows):
        return _prefill(arena, rows, request.window, request.protected)
    valid = slice(0, rows.length)
    return Prefill(
        keys=torch.from_numpy(arena.host_kv.keys[:, :, :, valid]),
        values=torch.from_numpy(arena.host_kv.values[:, :, :, valid]),
        queries=torch.from_numpy(arena.q_window),
        hidden_norm=torch.from_numpy(arena.hidden_norm[:, :, valid]),
        kv_len=torch.from_numpy(rows.lengths.astype(np.int64))[:, None],
        row_meta=torch.from_numpy(rows.marked(request.protected))[:, None],
        frame=request.frame,
        window=request.window,
    )


def _all_rows(arena: ReferenceArena, prompt: CacheRows, method: str) -> Kept:
    layers, _, groups = arena.host_kv.keys.shape[:3]
    length, copies = prompt.length, _FORMS[method].bytes_factor(arena.queries.shape[2], groups)
    keys, values = (
        torch.from_numpy(cache[:, :, :, :length]) for cache in (arena.host_kv.keys, arena.host_kv.values)
    )
    return Kept(
        keys=keys.repeat_interleave(copies, 2),
        values=values.repeat_interleave(copies, 2),
        row_meta=torch.from_numpy(prompt.row_meta.reshape(-1, 1, length, ROW_COLUMNS)).expand(
            layers, -1, -1, -1
        ),
        rows=torch.arange(length).expand(layers, 1, 1, -1),
        kv_len=torch.from_numpy(arena.kv.lengths.astype(np.int64)),
    )


def _store(kept: Kept, kv: KvBuffers, slot: int, method: str) -> None:
    heads, rows = kept.keys.shape[2], kept.keys.shape[3]
    if heads != kv.keys.shape[2]:
        raise UsageError(
            f"{method} keeps rows of {heads} heads, but the pool was made for {kv.keys.shape[2]}; "
            "name the method when making it"
        )
    if rows > kv.capacity:
        raise UsageError(f"{rows} kept rows do not fit a slot of {kv.capacity}")
    kv.keys[:, slot, :, :rows] = kept.keys[:, 0].numpy()
    kv.values[:, slot, :, :rows] = kept.values[:, 0].numpy()
    kv.row_meta[:, slot, :rows] = -1 if kept.row_meta is None else kept.row_meta[:, 0].numpy()
    kv.lengths[:, slot] = kept.kv_len[:, 0].numpy()


def _rows_of(kept: Kept) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = kept.rows[:, 0, :, : int(kept.kv_len.max())].numpy()
    return rows


def _stages_of(scores: StarKVScores) -> NDArray[np.float32]:
    boosted = scores.groups.mean(2)
    stages = [scores.pooled.mean(2), boosted, scores.after_mi, scores.after_temporal]
    stacked: NDArray[np.float32] = torch.cat(stages, 1).float().numpy()
    return stacked


def _state_of(memory: StarKVMemory) -> StarKVState:
    # Engines that reuse their buffers hand on more columns than the last screenshot had.
    pattern = memory.pattern_ema[..., : memory.progress.pattern_cells]
    arrays = (memory.mi_ema, pattern, memory.temperature)
    return StarKVState(memory.progress, *(torch.from_numpy(array) for array in arrays))


def _memory_of(state: StarKVState) -> StarKVMemory:
    tensors = (state.mi_ema, state.pattern_ema, state.temperature)
    return StarKVMemory(state.progress, *(tensor.float().numpy() for tensor in tensors))
