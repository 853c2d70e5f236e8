# SPDX-License-Identifier: Apache-2.0
"""The engine for GPUs, run on the processor: its memory, steps and compression against the CPU's engine.

In float32 both compute the same bits; what only a GPU can show is in ``benchmarks/gpu_check.py``.
"""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyModel
from tiny_model import HIDDEN, VOCAB

from starkv.errors import EngineError, UsageError
from starkv.export.build.ort import build_ort_engine
from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.methods.rows import prompt_rows
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.device_kv import DeviceKv, device_kv
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.ort_cuda import POOL_STEP, OrtDeviceEngine
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.positions import rope_tables, text_positions

PROMPT = prompt_rows(90, [(10, 46)], [(6, 6)], (0, 1, 2, 3))
"""A screenshot of 6x6 tokens in 90 rows."""


@pytest.fixture(scope="module")
def host(tiny: TinyModel) -> OrtEngine:
    return OrtEngine(tiny.engine, threads=1)


@pytest.fixture(scope="module")
def device(tiny: TinyModel) -> OrtDeviceEngine:
    return OrtDeviceEngine(tiny.engine, threads=1, device="cpu")


@pytest.fixture(scope="module")
def half(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> OrtDeviceEngine:
    out = tmp_path_factory.mktemp("half") / "engine"
    build_ort_engine(tiny.exports["fp32"], out, compute_dtype="float16")
    return OrtDeviceEngine(out, threads=1, device="cpu")


def embeds(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, HIDDEN)).astype(np.float32)


def rope(engine: Engine, rows: int, start: int = 0) -> Rope:
    return Rope(*rope_tables(text_positions(rows, start).values, engine.manifest.text))


def prefilled(engine: Engine, rows: int, seed: int = 0) -> tuple[Arena, np.ndarray]:
    arena = engine.new_arena(rows)
    return arena, engine.prefill(arena, embeds(rows, seed), rope(engine, rows))


def compressed(
    engine: Engine,
    policy: KvPolicy,
    memory: StarKVMemory | None = None,
    spoil: Callable[[Arena], None] = lambda _: None,
) -> tuple[Pool, Compressed]:
    """Prefill PROMPT, do ``spoil`` to it, and compress it into the second slot of a pool."""
    arena, _ = prefilled(engine, PROMPT.length)
    spoil(arena)
    pool = engine.new_pool(2, 100, policy.method)
    pool.acquire()
    return pool, engine.compress(arena, pool, pool.acquire(), PROMPT, policy, memory)


def cache_of(pool: Pool) -> list[np.ndarray]:
    if isinstance(pool.kv, DeviceKv):
        return [pool.kv.keys.read(), pool.kv.values.read()]
    return [pool.host_kv.keys, pool.host_kv.values]


def decode(engine: Engine, pool: Pool, start: int) -> np.ndarray:
    tables = [rope(engine, 1, start + slot) for slot in range(pool.active)]
    batch = Rope(np.concatenate([t.cos for t in tables]), np.concatenate([t.sin for t in tables]))
    return engine.decode(pool, embeds(pool.active, seed=start), batch)


def test_prefill_in_chunks_leaves_what_the_host_engine_leaves(
    host: OrtEngine, device: OrtDeviceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, logits = prefilled(host, 50)
    for chunk in (2048, 16):
        monkeypatch.setattr("starkv.runtime.engines.ort_cuda.PREFILL_CHUNK", chunk)
        monkeypatch.setattr("starkv.runtime.engines.ort.PREFILL_CHUNK", min(chunk, 512))
        expected, logits = prefilled(host, 50)
        arena, ours = prefilled(device, 50)
        np.testing.assert_array_equal(ours, logits)
        on_host = arena.on_host(device.manifest.text)
        np.testing.assert_array_equal(on_host.host_kv.keys, expected.host_kv.keys)
        np.testing.assert_array_equal(on_host.q_window, expected.q_window)
        np.testing.assert_array_equal(arena.hidden_norm, expected.hidden_norm)
        assert (arena.kv.lengths == 50).all()


def test_a_batch_decodes_as_on_the_host(host: OrtEngine, device: OrtDeviceEngine) -> None:
    """Sequences come and go; the last takes the slot of one that leaves."""
    pools = {}
    for engine in (host, device):
        pool = pools[engine] = engine.new_pool(3, 100)
        for seed, rows in enumerate((13, 40, 21)):
            arena, _ = prefilled(engine, rows, seed)
            engine.compress(arena, pool, pool.acquire(), prompt_rows(rows, [], []), KvPolicy())
    for step in range(9):
        if step == 3:
            for pool in pools.values():
                pool.release(0)
        results = [decode(engine, pool, 50 + step) for engine, pool in pools.items()]
        np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(pools[host].kv.lengths, pools[device].kv.lengths)


@pytest.mark.parametrize("method", ENGINE_METHODS)
def test_every_method_keeps_what_it_keeps_on_the_host(
    host: OrtEngine, device: OrtDeviceEngine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    policy = KvPolicy(method, Budget(ratio=0.4) if method != FULL else Budget())
    monkeypatch.setattr(device._compressor, "_kernels", None)
    (expected_pool, expected), (pool, ours) = (compressed(engine, policy) for engine in (host, device))
    np.testing.assert_array_equal(ours.rows, expected.rows)
    assert (ours.scores is None) == (expected.scores is None)
    kept = int(expected_pool.kv.lengths.max())
    for actual, wanted in zip(cache_of(pool), cache_of(expected_pool), strict=True):
        np.testing.assert_array_equal(actual[:, 1, :, :kept], wanted[:, 1, :, :kept])
    np.testing.assert_array_equal(pool.kv.lengths, expected_pool.kv.lengths)
    np.testing.assert_array_equal(pool.kv.row_meta[:, 1, :kept], expected_pool.kv.row_meta[:, 1, :kept])


def test_float16_keeps_and_says_what_float32_does(host: OrtEngine, half: OrtDeviceEngine) -> None:
    assert half.info.kv_bytes_per_row * 2 == host.info.kv_bytes_per_row
    assert (half.info.backend, half.info.compute_dtype, half.info.kv_dtype) == (
        "ort-cpu",
        "float16",
        "float16",
    )
    (_, expected), (arena, logits) = prefilled(host, 60), prefilled(half, 60)
    assert arena.kv.bytes_held == 60 * half.info.kv_bytes_per_row
    assert np.abs(logits - expected).max() <= 1e-2 * np.abs(expected).max()
    policy = KvPolicy(STAR_KV, Budget(ratio=0.4))
    (theirs, _), (ours, result) = (compressed(engine, policy) for engine in (host, half))
    assert (ours.kv.lengths == theirs.kv.lengths).all()
    # Rows are copied, never rounded again.
    whole, _ = prefilled(half, 90)
    cache = device_kv(whole.kv).keys.read()
    kept = device_kv(ours.kv).keys.read()
    for layer, rows in enumerate(result.rows[:, 0]):
        rows = rows[rows >= 0]
        np.testing.assert_array_equal(kept[layer, 1, :, : len(rows)], cache[layer, 0][:, rows])
    steps = [decode(engine, pool, 90) for engine, pool in ((host, theirs), (half, ours))]
    assert np.abs(steps[0] - steps[1]).max() <= 5e-2 * np.abs(steps[0]).max()


def test_a_pools_memory_and_steps_serve_the_next(device: OrtDeviceEngine) -> None:
    pool = device.new_pool(1, 40)
    arena, _ = prefilled(device, 20)
    device.compress(arena, pool, pool.acquire(), prompt_rows(20, [], []), KvPolicy())
    first = decode(device, pool, 20)
    memory = device_kv(pool.kv)
    address, step = memory.keys.address, memory.steps[1]
    del pool
    gc.collect()
    pool = device.new_pool(1, POOL_STEP)
    assert device_kv(pool.kv).keys.address == address
    assert (pool.kv.lengths == 0).all()
    assert (pool.kv.row_meta == -1).all()
    device.compress(arena, pool, pool.acquire(), prompt_rows(20, [], []), KvPolicy())
    np.testing.assert_array_equal(decode(device, pool, 20), first)
    assert device_kv(pool.kv).steps[1] is step
    other = device.new_pool(1, POOL_STEP)
    assert device_kv(other.kv).keys.address != address


def test_another_engines_memory_is_refused(host: OrtEngine, device: OrtDeviceEngine) -> None:
    for engine, other in ((host, device), (device, host)):
        arena = other.new_arena(10)
        with pytest.raises(UsageError, match="is another engine's; make it with this engine's new_"):
            engine.prefill(arena, embeds(10), rope(engine, 10))
        pool = other.new_pool(1, 10)
        pool.acquire()
        with pytest.raises(UsageError, match="this KV cache is another engine's"):
            engine.decode(pool, embeds(1), rope(engine, 1))


def test_a_full_slot_and_an_unprefilled_arena_are_refused(device: OrtDeviceEngine) -> None:
    pool = device.new_pool(1, 10)
    pool.acquire()
    pool.kv.lengths[:] = pool.kv.capacity
    with pytest.raises(UsageError, match=f"filled its slot of {POOL_STEP} rows"):
        decode(device, pool, 0)
    arena = device.new_arena(90)
    arena.kv.lengths[:] = 90
    with pytest.raises(UsageError, match="the arena holds no prompt"):
        device.compress(arena, pool, pool.handles[0], PROMPT, KvPolicy(STAR_KV, Budget(ratio=0.4)))


def test_engines_of_the_wrong_device_are_refused(
    tiny: TinyModel, half: OrtDeviceEngine, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"computes in float32, for processors; build one for a GPU"):
        OrtDeviceEngine(tiny.engine)
    build_ort_engine(tiny.exports["fp32"], tmp_path / "engine", compute_dtype="bfloat16")
    with pytest.raises(EngineError, match=r"computes in bfloat16, for a GPU; build one for processors"):
        OrtEngine(tmp_path / "engine")
    with pytest.raises(EngineError, match=r"pip install 'starkv\[cuda\]'|no NVIDIA GPU here|has no bfloat16"):
        OrtDeviceEngine(tmp_path / "engine")
    assert half.manifest.text.vocab == VOCAB
