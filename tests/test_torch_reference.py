# SPDX-License-Identifier: Apache-2.0
"""The reference engine: the numbers of ONNX Runtime's engine, and the methods that only it has."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModel
from tiny_model import HIDDEN, make_tiny_model

from starkv.errors import CheckpointError, EngineError, UsageError
from starkv.methods.budget import Budget
from starkv.methods.rows import PromptRows, prompt_rows
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.engines import torch_decoder
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.torch_decoder import TorchCache, TorchDecoder, attention_sums, negligible_share
from starkv.runtime.engines.torch_reference import TorchReferenceEngine
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.positions import rope_tables

TOLERANCE = 1e-4
STEPS = 4
PROMPT = prompt_rows(90, [(10, 34), (40, 76)], [(4, 6), (6, 6)], protect_order=[0, 1, 2, 80])
FULL = KvPolicy()


@pytest.fixture(scope="module")
def ort(tiny: TinyModel) -> OrtEngine:
    return OrtEngine(tiny.engine, threads=1)


@pytest.fixture(scope="module")
def reference(tiny: TinyModel) -> TorchReferenceEngine:
    return TorchReferenceEngine.load(tiny.engine, tiny.checkpoint, threads=1)


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


def test_full_cache_equals_onnx_runtime(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    (_, pool, logits), (_, expected_pool, expected) = reply(reference, FULL), reply(ort, FULL)
    assert_close(logits, expected)
    rows = PROMPT.length + STEPS
    assert_close(pool.kv.keys[:, :, :, :rows], expected_pool.kv.keys[:, :, :, :rows])
    assert_close(pool.kv.values[:, :, :, :rows], expected_pool.kv.values[:, :, :, :rows])
    assert (pool.kv.lengths == rows).all()


def test_a_prefill_leaves_what_onnx_runtime_leaves(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    """Also when it comes in two parts."""
    expected, expected_logits = prefilled(ort, 50)
    arena, embeds, tables = reference.new_arena(50), random_embeds(50, 0), rope(reference, 50)
    for part in (slice(0, 30), slice(30, 50)):
        logits = reference.prefill(arena, embeds[part], Rope(tables.cos[:, part], tables.sin[:, part]))
    assert_close(logits, expected_logits)
    assert_close(arena.q_window, expected.q_window)
    assert_close(arena.hidden_norm[:, :, :50], expected.hidden_norm[:, :, :50])
    assert_close(arena.kv.keys[:, :, :, :50], expected.kv.keys[:, :, :, :50])


def test_sequences_of_different_lengths_are_decoded_together(
    ort: OrtEngine, reference: TorchReferenceEngine
) -> None:
    def step(engine: Engine) -> np.ndarray:
        pool = engine.new_pool(3, 60)
        for seed, rows in enumerate((13, 5, 40)):
            prompt = prompt_rows(rows, [], [])
            engine.compress(prefilled(engine, rows, seed)[0], pool, pool.acquire(), prompt, FULL)
        pool.release(0)
        tables = [rope(engine, 1, start) for start in (40, 5)]
        both = Rope(*(np.concatenate([getattr(t, name) for t in tables]) for name in ("cos", "sin")))
        return engine.decode(pool, random_embeds(2, 9), both)

    assert_close(step(reference), step(ort))


@pytest.mark.parametrize("mode", ["native", "official"])
@pytest.mark.parametrize("budget", [Budget(0.3), Budget(1.0), Budget(capacity=100)], ids=str)
def test_star_kv_equals_onnx_runtime_over_a_trajectory(
    ort: OrtEngine, reference: TorchReferenceEngine, mode: str, budget: Budget
) -> None:
    policy = KvPolicy("star_kv", budget, StarKVConfig.of_mode(mode))
    memories: list[StarKVMemory | None] = [None, None]
    for seed in range(3):
        (ours, pool, logits), (theirs, expected_pool, expected) = (
            reply(engine, policy, memory=memory, seed=seed)
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
                past = slice(0, PROMPT.length - policy.star_kv.window)
                assert_close(getattr(ours, name)[..., past], array[..., past])
        assert ours.memory is not None
        assert theirs.memory is not None
        assert ours.memory.progress == theirs.memory.progress
        assert_close(ours.memory.mi_ema, theirs.memory.mi_ema)
        assert_close(ours.memory.temperature, theirs.memory.temperature)
        cells = ours.memory.progress.pattern_cells
        assert_close(ours.memory.pattern_ema[..., :cells], theirs.memory.pattern_ema[..., :cells])
        memories = [ours.memory, theirs.memory]


def test_a_cache_per_query_head_computes_the_same(reference: TorchReferenceEngine) -> None:
    """Rows of KV heads and their copies for every query head, in layers of different lengths."""
    decoder, text = reference._decoder, reference.manifest.text
    arena, _ = prefilled(reference, 20)
    rows = (torch.from_numpy(buffer) for buffer in (arena.kv.keys, arena.kv.values))
    keys, values = (buffer[:, :, :, :30].clone() for buffer in rows)
    lengths = torch.tensor([[20], [11]], dtype=torch.int32)
    copies = text.heads // text.kv_heads
    shared = TorchCache(keys, values, lengths)
    repeated = TorchCache(
        keys.repeat_interleave(copies, 2), values.repeat_interleave(copies, 2), lengths.clone()
    )
    embeds, table = torch.from_numpy(random_embeds(3, 5))[None], rope(reference, 3, 20)
    tables = torch.from_numpy(table.cos), torch.from_numpy(table.sin)
    expected, actual = decoder.step(embeds, *tables, shared), decoder.step(embeds, *tables, repeated)
    assert_close(actual.logits.numpy(), expected.logits.numpy())
    np.testing.assert_array_equal(repeated.lengths, [[23], [14]])
    assert_close(repeated.keys[:, :, ::copies].numpy(), shared.keys.numpy())


def naive_attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention weights ``[L, B, H, S, S]``."""
    rows, dim = queries.shape[3:]
    repeated = keys.repeat_interleave(queries.shape[2] // keys.shape[2], 2)
    scores = torch.einsum("lbhqd,lbhkd->lbhqk", queries, repeated) / dim**0.5
    future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_attention_statistics_equal_naive_ones(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(torch_decoder, "QUERY_CHUNK", chunk)
    torch.manual_seed(0)
    queries, keys = 2 * torch.randn(2, 1, 6, 40, 8), torch.randn(2, 1, 3, 40, 8)
    weights = naive_attention(queries, keys)
    torch.testing.assert_close(attention_sums(queries, keys), weights.sum(-2))
    for first in (0, 31, 39):
        visible = torch.ones(40, 40, dtype=torch.bool).tril()[first:]
        expected = [(layer[0, :, first:][:, visible] <= 0.01).float().mean() for layer in weights]
        torch.testing.assert_close(negligible_share(queries, keys, first), torch.stack(expected))


def test_a_tied_head_is_the_embedding(tiny: TinyModel, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, tied=True)
    text = OrtEngine(tiny.engine, threads=1).manifest.text
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    assert "lm_head.weight" not in weights
    tied = TorchDecoder(text.model_copy(update={"tied_embedding": True}), 1e-2, weights)
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    untied = TorchDecoder(text, 1e-2, weights)
    embeds, half = torch.from_numpy(random_embeds(5, 0))[None], torch.zeros(1, 5, text.head_dim // 2)
    steps = [
        decoder.step(embeds, half + 1, half, TorchCache.allocate(text, 1, 5, torch.float32))
        for decoder in (tied, untied)
    ]
    assert torch.equal(steps[0].logits, steps[1].logits)


def test_bfloat16_stays_close(tiny: TinyModel, reference: TorchReferenceEngine) -> None:
    text = reference.manifest.text
    weights = {name: tensor.detach() for name, tensor in tiny.model.named_parameters()}
    decoder = TorchDecoder(text, 1e-2, weights, torch.bfloat16)
    cache, table = TorchCache.allocate(text, 1, 20, torch.bfloat16), rope(reference, 20)
    embeds = torch.from_numpy(random_embeds(20, 0))[None]
    step = decoder.step(embeds, torch.from_numpy(table.cos), torch.from_numpy(table.sin), cache)
    expected = torch.from_numpy(prefilled(reference, 20)[1])
    assert step.logits.dtype == torch.float32
    assert torch.cosine_similarity(step.logits[0], expected, dim=0) > 0.99


def another_arena(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    reference.prefill(ort.new_arena(5), random_embeds(5, 0), rope(ort, 5))


def another_prompt(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    pool = reference.new_pool(1, 90)
    reference.compress(prefilled(reference, 89)[0], pool, pool.acquire(), PROMPT, FULL)


def small_slot(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    pool = reference.new_pool(1, 64)
    reference.compress(prefilled(reference, 90)[0], pool, pool.acquire(), PROMPT, FULL)


def full_slot(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    pool, prompt = reference.new_pool(1, 64), prompt_rows(64, [], [])
    reference.compress(prefilled(reference, 64)[0], pool, pool.acquire(), prompt, FULL)
    reference.decode(pool, random_embeds(1, 0), rope(reference, 1))


def overfull_arena(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    arena, _ = prefilled(reference, 60)
    reference.prefill(arena, random_embeds(5, 0), rope(reference, 5))


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (another_arena, "another engine's"),
        (another_prompt, "holds 89 rows, the prompt 90"),
        (small_slot, "90 kept rows do not fit a slot of 64"),
        (full_slot, "filled its slot of 64 rows"),
        (overfull_arena, "prefill of 5 rows behind 60 exceeds the arena of 64 rows"),
        (lambda ort, reference: prefilled(reference, 0), "at least one row"),
        (lambda ort, reference: reference.new_pool(1, 9, "magic"), "no KV method 'magic'; it has: full"),
        (
            lambda ort, reference: reference.new_arena(513),
            "513 KV rows are needed, but tiny was built for 512",
        ),
    ],
)
def test_misuse_is_refused(
    ort: OrtEngine,
    reference: TorchReferenceEngine,
    misuse: Callable[[OrtEngine, TorchReferenceEngine], None],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        misuse(ort, reference)


def test_keys_that_are_not_numbers_are_refused(reference: TorchReferenceEngine) -> None:
    arena, _ = prefilled(reference, PROMPT.length)
    arena.kv.keys[1, 0, 1, 5] = np.inf
    pool = reference.new_pool(1, 90)
    with pytest.raises(EngineError, match="layer 1 are not numbers"):
        reference.compress(arena, pool, pool.acquire(), PROMPT, KvPolicy("star_kv", Budget(0.5)))


def no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


def damaged_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"nothing")


def no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def other_weights(checkpoint: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(HIDDEN)}, checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "holds no safetensors"),
        (damaged_weights, "is damaged"),
        (no_config, "gives no rms_norm_eps"),
        (other_weights, "holds no unquantized tensor lm_head.weight"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    tiny: TinyModel, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint, checkpoint)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        TorchReferenceEngine.load(tiny.engine, checkpoint, threads=1)
