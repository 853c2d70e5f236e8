# SPDX-License-Identifier: Apache-2.0
"""Compression in the reference engine: what ONNX Runtime keeps, and the methods that only it has."""

import numpy as np
import pytest
import torch
from conftest import TinyModel
from engine_runs import (
    PROMPT,
    SMALLER,
    STEPS,
    assert_close,
    naive_attention,
    prefilled,
    random_embeds,
    reply,
    rope,
)
from tiny_model import LAYERS

from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.vl_cache import shared_rows
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.torch_compress import PER_HEAD, REFERENCE_METHODS
from starkv.runtime.engines.torch_reference import TorchReferenceEngine
from starkv.runtime.kv.policy import KvPolicy, StarKVMemory

FULL = KvPolicy()


@pytest.fixture(scope="module")
def ort(tiny: TinyModel) -> OrtEngine:
    return OrtEngine(tiny.engine, threads=1)


@pytest.fixture(scope="module")
def reference(tiny: TinyModel) -> TorchReferenceEngine:
    return TorchReferenceEngine.load(tiny.engine, tiny.checkpoint, threads=1)


@pytest.mark.parametrize("mode", ["native", "official"])
@pytest.mark.parametrize("budget", [Budget(0.3), Budget(1.0), Budget(capacity=100)], ids=str)
def test_star_kv_equals_onnx_runtime_over_a_trajectory(
    ort: OrtEngine, reference: TorchReferenceEngine, mode: str, budget: Budget
) -> None:
    """Each engine goes on from what the other remembers."""
    policy = KvPolicy("star_kv", budget, StarKVConfig.of_mode(mode))
    memories: list[StarKVMemory | None] = [None, None]
    for seed, prompt in enumerate((PROMPT, PROMPT, SMALLER, SMALLER, PROMPT)):
        (ours, pool, logits), (theirs, expected_pool, expected) = (
            reply(engine, policy, prompt, memory, seed)
            for engine, memory in zip((reference, ort), memories, strict=True)
        )
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(pool.kv.lengths, expected_pool.kv.lengths)
        assert pool.kv.bytes_held == expected_pool.kv.bytes_held
        assert_close(logits, expected)
        for name in ("scores", "stages"):
            if (array := getattr(theirs, name)) is None:
                assert getattr(ours, name) is None
            else:
                past = slice(0, prompt.length - policy.star_kv.window)
                assert_close(getattr(ours, name)[..., past], array[..., past])
        assert ours.memory is not None
        assert theirs.memory is not None
        assert ours.memory.progress == theirs.memory.progress
        assert_close(ours.memory.mi_ema, theirs.memory.mi_ema)
        assert_close(ours.memory.temperature, theirs.memory.temperature)
        cells = ours.memory.progress.pattern_cells
        assert_close(ours.memory.pattern_ema[..., :cells], theirs.memory.pattern_ema[..., :cells])
        memories = [theirs.memory, ours.memory]


@pytest.mark.parametrize("budget", [Budget(0.3), Budget(0.6), Budget(1.0), Budget(capacity=100)], ids=str)
@pytest.mark.parametrize("name", [name for name in ENGINE_METHODS if name != "star_kv"])
def test_methods_of_every_engine_equal_onnx_runtime(
    ort: OrtEngine, reference: TorchReferenceEngine, name: str, budget: Budget
) -> None:
    policy = KvPolicy(name, budget, seed=7)
    (ours, pool, logits), (theirs, expected_pool, expected) = reply(reference, policy), reply(ort, policy)
    np.testing.assert_array_equal(ours.rows, np.broadcast_to(theirs.rows, ours.rows.shape))
    np.testing.assert_array_equal(pool.kv.lengths, expected_pool.kv.lengths)
    assert pool.kv.bytes_held == expected_pool.kv.bytes_held
    assert_close(logits, expected)


ONLY_HERE = [name for name in REFERENCE_METHODS if name not in ENGINE_METHODS]


@pytest.mark.parametrize("name", ONLY_HERE)
def test_methods_of_the_reference_alone(reference: TorchReferenceEngine, name: str) -> None:
    """A whole budget is the full cache; a fifth keeps a fifth of the rows, for as many heads as named."""
    text = reference.manifest.text
    heads = text.heads if name.endswith(PER_HEAD) else text.kv_heads
    _, _, expected = reply(reference, FULL)
    whole, pool, logits = reply(reference, KvPolicy(name))
    assert whole.rows.shape == (LAYERS, heads, PROMPT.length)
    assert_close(logits, expected)
    assert pool.kv.bytes_held == 2 * 4 * LAYERS * (PROMPT.length + STEPS) * heads * text.head_dim
    _, spared, logits = reply(reference, KvPolicy(name, Budget(capacity=100)))
    assert_close(logits, expected)
    assert spared.kv.bytes_held == pool.kv.bytes_held

    compressed, pool, logits = reply(reference, KvPolicy(name, Budget(0.2)))
    lengths = pool.kv.lengths[:, 0] - STEPS
    # PyramidKV's steps are rounded down, VL-Cache's shares of the rows as well.
    assert abs(int(lengths.sum()) - LAYERS * 18) <= LAYERS
    assert pool.kv.bytes_held == 2 * 4 * int((lengths + STEPS).sum()) * heads * text.head_dim
    for layer, length in enumerate(lengths):
        rows = compressed.rows[layer]
        assert (np.diff(rows[:, :length]) > 0).all()
        assert (rows[:, length:] == -1).all()
        # What is decoded from are the prompt's keys of these rows, of each query head's KV head.
        arena, _ = prefilled(reference, PROMPT.length)
        of_head = arena.kv.keys[layer, 0, np.arange(heads) * text.kv_heads // heads]
        kept = np.take_along_axis(of_head, rows[:, :length, None], 1)
        assert_close(pool.kv.keys[layer, 0, :, :length], kept)
    assert np.isfinite(logits).all()


def test_h2o_and_vl_cache_see_the_attention_of_the_prefill(reference: TorchReferenceEngine) -> None:
    arena = reference.new_arena(PROMPT.length)
    reference.prefill(arena, random_embeds(PROMPT.length, 0), rope(reference, PROMPT.length))
    queries, keys = (
        torch.from_numpy(rows[:, :, :, : PROMPT.length]) for rows in (arena.queries, arena.kv.keys)
    )
    weights = naive_attention(queries, keys)
    sums = reply(reference, KvPolicy("h2o_per_head", Budget(0.2)))[0].scores
    assert sums is not None
    assert_close(sums, weights.sum(-2)[:, 0].numpy())

    text = PROMPT.length - PROMPT.spans[-1][1]
    visible = torch.ones(PROMPT.length, PROMPT.length, dtype=torch.bool).tril()[-text:]
    sparsity = torch.stack([(layer[0, :, -text:][:, visible] <= 0.01).float().mean() for layer in weights])
    kept = reply(reference, KvPolicy("vl_cache", Budget(0.2)))[1].kv.lengths[:, 0] - STEPS
    np.testing.assert_array_equal(kept, shared_rows(sparsity, 18))
