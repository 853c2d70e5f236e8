# SPDX-License-Identifier: Apache-2.0
"""The same prompts through any engine: prefill, compress, a few decode steps."""

import numpy as np
import torch
from tiny_model import HIDDEN

from starkv.methods.rows import PromptRows, prompt_rows
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.positions import rope_tables

TOLERANCE = 1e-4
STEPS = 4
PROMPT = prompt_rows(90, [(10, 34), (40, 76)], [(4, 6), (6, 6)], protect_order=[0, 1, 2, 80])
"""Two screenshots in text."""
SMALLER = prompt_rows(80, [(10, 34), (40, 60)], [(4, 6), (5, 4)], protect_order=[0, 1, 2, 70])
"""The second one is smaller."""


def random_embeds(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, HIDDEN)).astype(np.float32)


def rope(engine: Engine, rows: int, start: int = 0) -> Rope:
    """Tables of positions whose t, h and w differ."""
    row = np.arange(start, start + rows)
    return Rope(*rope_tables(np.stack([row, row // 3 + 5, row % 7 + 2]), engine.manifest.text))


def prefilled(engine: Engine, rows: int, seed: int = 0) -> tuple[Arena, np.ndarray]:
    arena = engine.new_arena(rows)
    return arena, engine.prefill(arena, random_embeds(rows, seed), rope(engine, rows))


def reply(
    engine: Engine,
    policy: KvPolicy,
    prompt: PromptRows = PROMPT,
    memory: StarKVMemory | None = None,
    seed: int = 0,
) -> tuple[Compressed, Pool, np.ndarray]:
    """Prefill, compress and decode; logits ``[1 + STEPS, vocab]``."""
    arena, first = prefilled(engine, prompt.length, seed)
    pool = engine.new_pool(1, engine.most_kept_rows(prompt.length, policy) + STEPS, policy.method)
    compressed = engine.compress(arena, pool, pool.acquire(), prompt, policy, memory)
    logits = [first]
    for step in range(STEPS):
        table = rope(engine, 1, prompt.length + step)
        logits.append(engine.decode(pool, random_embeds(1, 100 + step), table)[0])
    return compressed, pool, np.stack(logits)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max(initial=0.0) <= TOLERANCE * np.abs(expected).max(initial=0.0)


def naive_attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention weights ``[L, B, H, S, S]``."""
    rows, dim = queries.shape[3:]
    repeated = keys.repeat_interleave(queries.shape[2] // keys.shape[2], 2)
    scores = torch.einsum("lbhqd,lbhkd->lbhqk", queries, repeated) / dim**0.5
    future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)
