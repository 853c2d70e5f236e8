# SPDX-License-Identifier: Apache-2.0
"""The reference engine steps as ONNX Runtime's does, and refuses what it can't do."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModel
from engine_runs import PROMPT, STEPS, assert_close, prefilled, random_embeds, reply, rope
from tiny_model import HIDDEN

from starkv.errors import CheckpointError, EngineError, UsageError
from starkv.methods.budget import Budget
from starkv.methods.rows import prompt_rows
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.torch_reference import TorchReferenceEngine
from starkv.runtime.kv.policy import KvPolicy

FULL = KvPolicy()


@pytest.fixture(scope="module")
def ort(tiny: TinyModel) -> OrtEngine:
    return OrtEngine(tiny.engine, threads=1)


@pytest.fixture(scope="module")
def reference(tiny: TinyModel) -> TorchReferenceEngine:
    return TorchReferenceEngine.load(tiny.engine, tiny.checkpoint, threads=1)


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


def another_arena(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    reference.prefill(ort.new_arena(5), random_embeds(5, 0), rope(ort, 5))


def another_prompt(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    pool = reference.new_pool(1, 90)
    reference.compress(prefilled(reference, 89)[0], pool, pool.acquire(), PROMPT, FULL)


def small_slot(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    pool = reference.new_pool(1, 64)
    reference.compress(prefilled(reference, 90)[0], pool, pool.acquire(), PROMPT, FULL)


def shared_heads(ort: OrtEngine, reference: TorchReferenceEngine) -> None:
    policy, pool = KvPolicy("snapkv_per_head", Budget(0.5)), reference.new_pool(1, 90, "snapkv")
    reference.compress(prefilled(reference, 90)[0], pool, pool.acquire(), PROMPT, policy)


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
        (shared_heads, "snapkv_per_head keeps rows of 4 heads, but the pool was made for 2"),
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
