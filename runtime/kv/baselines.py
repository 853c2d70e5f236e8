# SPDX-License-Identifier: Apache-2.0
"""Baselines in the engine: which rows they keep, in numpy, from what the decoder puts out anyway.

These are the variants with one index set per KV head, so that a cache keeps its size; the forms of the
papers, one index set per attention head, run in the PyTorch reference (``starkv/methods``), which the tests
compare.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starkv.methods.budget import pyramid_rows, window_rows
from starkv.methods.names import GUI_KV, PYRAMIDKV, RANDOM, STREAMING_LLM
from starkv.methods.rows import ROW_FRAME, PromptRows
from starkv.runtime.kv.buffers import Arena
from starkv.runtime.kv.policy import KvPolicy

Floats = NDArray[np.float32]

SINKS = 4
"""First rows that StreamingLLM keeps."""
WINDOW = 8
BOOST, BOOST_TEMPERATURE = 2.0, 3.5
"""GUI-KV's alpha and temperature, as in its scripts."""
_BASIS = 32
"""Tokens of the newest screenshot whose keys span what GUI-KV takes for redundant."""


@dataclass(frozen=True)
class Choice:
    """What a baseline wants kept."""

    scores: Floats
    """``[L, N, S]`` for the S rows of the prompt; N is 1 or G."""
    window: int
    """Last rows, kept in any case."""
    keep: tuple[int, ...]
    """``[L]`` rows of each layer, the window included."""


def kept_rows_per_layer(policy: KvPolicy, layers: int, prompt_rows: int) -> tuple[int, ...]:
    """Rows that a baseline keeps in each layer."""
    kept = policy.kept_rows(prompt_rows)
    if policy.method == PYRAMIDKV:
        return pyramid_rows(layers, prompt_rows, kept, window_rows(WINDOW, kept))
    return (kept,) * layers


def choose(
    policy: KvPolicy, prompt: PromptRows, arena: Arena, score_window: Callable[[int], Floats]
) -> Choice:
    """Score a prompt's rows.

    Args:
        policy: method, budget and seed.
        prompt: what the rows are.
        arena: the prefilled prompt.
        score_window: pooled attention ``[L, G, S]`` of the last so many queries, mean over each KV head's
            queries.
    """
    layers, length = len(arena.host_kv.keys), prompt.length
    keep = kept_rows_per_layer(policy, layers, length)
    if policy.method == STREAMING_LLM:
        # The last row stays even where the budget has room for the first ones alone.
        window = max(1, keep[0] - SINKS)
        order = -np.arange(length, dtype=np.float32)
        return Choice(np.broadcast_to(order, (layers, 1, length)), window, keep)
    if policy.method == RANDOM:
        drawn = np.random.default_rng(policy.seed).random((layers, 1, length), np.float32)
        return Choice(drawn, window_rows(WINDOW, keep[0]), keep)
    window = window_rows(WINDOW, policy.kept_rows(length))
    scores = score_window(window)
    if policy.method == GUI_KV:
        scores = _gui_kv(scores, prompt, arena, window, keep[0])
    return Choice(scores, window, keep)


def _gui_kv(scores: Floats, prompt: PromptRows, arena: Arena, window: int, kept: int) -> Floats:
    """Boost the newest screenshot, and drop what older ones show again (docs/spec/baselines.md, GUI-KV)."""
    frame, length = prompt.newest_frame(window), prompt.length
    if not frame.cells:
        return scores
    scores = scores.copy()
    start = length - frame.rows_to_end
    newest = slice(start, start + frame.cells)
    norms = arena.hidden_norm[:, 0, newest]
    deviation = norms.std(-1, ddof=1, keepdims=True) if frame.cells > 1 else np.zeros_like(norms)
    z = (norms - norms.mean(-1, keepdims=True)) / (deviation + 1e-8) / BOOST_TEMPERATURE
    shares = np.exp(z - z.max(-1, keepdims=True))
    scores[:, :, newest] += (BOOST * shares / shares.sum(-1, keepdims=True))[:, None]
    of_row = prompt.row_meta[: length - window, ROW_FRAME]
    history = np.flatnonzero((of_row >= 0) & (of_row < frame.index))
    pruned = int((1.0 - kept / length) * len(history))
    if not pruned:
        return scores
    for layer, layer_scores in enumerate(scores):
        keys = arena.host_kv.keys[layer, 0]
        spanning = keys[:, start : start + min(_BASIS, frame.cells)]
        basis = np.linalg.qr(spanning.transpose(0, 2, 1))[0]
        old = keys[:, history]
        residual = np.linalg.norm(old - old @ basis @ basis.transpose(0, 2, 1), axis=-1)
        redundant = history[np.argsort(residual, axis=-1, kind="stable")[:, :pruned]]
        np.put_along_axis(layer_scores, redundant, 0.0, axis=-1)
    return scores


def priorities(choice: Choice, capacity: int) -> Floats:
    """Scores as the operator ``Compact`` takes them: ``[L, 1, N, C]``, +inf in the window, −inf behind the
    rows."""
    layers, sets, length = choice.scores.shape
    ranked = np.full((layers, 1, sets, capacity), -np.inf, np.float32)
    ranked[:, 0, :, :length] = choice.scores
    ranked[..., length - choice.window : length] = np.inf
    return ranked
