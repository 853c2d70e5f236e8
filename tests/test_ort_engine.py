# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime engine: transformers' numbers, sequences that don't disturb each other, clear errors."""

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from conftest import TinyModel
from decoder_reference import DecoderReference
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import HIDDEN, LAYERS, VOCAB

from starkv.errors import EngineError, UsageError
from starkv.methods.rows import PromptRows, prompt_rows
from starkv.runtime.engines import ort as ort_engine
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.stepping import chunk_lengths
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.positions import rope_tables, text_positions

WINDOW = 8
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> OrtEngine:
    return OrtEngine(tiny.engine, threads=1)


def random_embeds(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, HIDDEN)).astype(np.float32)


def positions(rows: int, start: int = 0) -> np.ndarray:
    """``[3, S]`` whose t, h and w differ."""
    row = np.arange(start, start + rows)
    return np.stack([row, row // 3 + 5, row % 7 + 2])


def rope(engine: OrtEngine, values: np.ndarray) -> Rope:
    return Rope(*rope_tables(values, engine.manifest.text))


def prefilled(engine: OrtEngine, rows: int, seed: int = 0) -> tuple[Arena, np.ndarray]:
    """An arena with a random sequence, and the logits of its last row."""
    arena = engine.new_arena(rows)
    return arena, engine.prefill(arena, random_embeds(rows, seed), rope(engine, positions(rows)))


def text_rows(rows: int) -> PromptRows:
    """A prompt without screenshots."""
    return prompt_rows(rows, [], [])


def admit(engine: OrtEngine, pool: Pool, rows: int, seed: int) -> int:
    handle = pool.acquire()
    engine.compress(prefilled(engine, rows, seed)[0], pool, handle, text_rows(rows), KvPolicy())
    return handle


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_prefill_and_sixteen_steps_equal_transformers(tiny: TinyModel, engine: OrtEngine) -> None:
    reference = DecoderReference(tiny.model)
    arena, logits = prefilled(engine, 20)
    expected = reference.step(random_embeds(20)[None], positions(20)[:, None], WINDOW)
    assert_close(logits[None], expected.logits)
    assert_close(arena.q_window, expected.q_window)
    assert_close(arena.hidden_norm[:, :, :20], expected.hidden_norm)
    pool = engine.new_pool(1, 40)
    engine.compress(arena, pool, pool.acquire(), text_rows(20), KvPolicy())
    for step in range(16):
        embeds, values = random_embeds(1, seed=100 + step), positions(1, 20 + step)
        expected = reference.step(embeds[None], values[:, None], WINDOW)
        assert_close(engine.decode(pool, embeds, rope(engine, values)), expected.logits)
    assert (pool.kv.lengths == 36).all()
    assert pool.kv.bytes_held == 36 * engine.info.kv_bytes_per_row


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(1, 600))
def test_chunks_cover_the_prefill_and_end_with_a_whole_window(total: int, chunk: int, window: int) -> None:
    lengths = chunk_lengths(total, chunk, window)
    assert sum(lengths) == total
    assert all(1 <= length <= max(chunk, window) for length in lengths)
    assert lengths[-1] >= min(window, total)
    assert len(lengths) == -(-total // max(chunk, window))


@pytest.mark.parametrize("chunk", [1, 9, 16, 25])
def test_prefill_in_chunks_equals_one_prefill(
    engine: OrtEngine, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Logits, cache, the last queries and every norm: nothing tells how the prefill was cut."""
    rows = 50
    whole, expected = prefilled(engine, rows)
    monkeypatch.setattr(ort_engine, "PREFILL_CHUNK", chunk)
    cut, logits = prefilled(engine, rows)
    assert_close(logits, expected)
    assert_close(cut.kv.keys[:, :, :, :rows], whole.kv.keys[:, :, :, :rows])
    assert_close(cut.kv.values[:, :, :, :rows], whole.kv.values[:, :, :, :rows])
    assert_close(cut.q_window[:, :, :, -WINDOW:], whole.q_window)
    assert_close(cut.hidden_norm[:, :, :rows], whole.hidden_norm[:, :, :rows])
    assert (cut.kv.lengths == rows).all()


def test_a_second_prefill_continues_the_sequence(engine: OrtEngine) -> None:
    whole, expected = prefilled(engine, 30)
    arena, embeds = engine.new_arena(30), random_embeds(30)
    for part in (slice(0, 12), slice(12, 30)):
        logits = engine.prefill(arena, embeds[part], rope(engine, positions(30)[:, part]))
    assert_close(logits, expected)
    assert_close(arena.hidden_norm[:, :, :30], whole.hidden_norm[:, :, :30])


def test_a_reset_arena_starts_anew(engine: OrtEngine) -> None:
    arena, _ = prefilled(engine, 40, seed=1)
    arena.reset()
    logits = engine.prefill(arena, random_embeds(20), rope(engine, positions(20)))
    np.testing.assert_array_equal(logits, prefilled(engine, 20)[1])


def decode_all(engine: OrtEngine, pool: Pool, steps: dict[int, int]) -> dict[int, np.ndarray]:
    """One step of every sequence; ``steps`` tells each handle's position, logits come by handle."""
    embeds = np.concatenate([random_embeds(1, 7 * handle + steps[handle]) for handle in pool.handles])
    tables = [rope(engine, positions(1, steps[handle])) for handle in pool.handles]
    batch = Rope(np.concatenate([t.cos for t in tables]), np.concatenate([t.sin for t in tables]))
    logits = engine.decode(pool, embeds, batch)
    for handle in pool.handles:
        steps[handle] += 1
    return dict(zip(pool.handles, logits, strict=True))


def test_a_batch_computes_what_each_sequence_would_alone(engine: OrtEngine) -> None:
    """Also after one has left, when the last has taken its slot, and after another has come."""
    lengths = {0: 13, 1: 5, 2: 40, 3: 21}
    pool, alone = engine.new_pool(3, 60), {}
    steps = {handle: rows for handle, rows in lengths.items() if handle < 3}
    for handle, rows in lengths.items():
        alone[handle] = engine.new_pool(1, 60)
        admit(engine, alone[handle], rows, seed=handle)
        # A handle belongs to its pool; the embeddings of a step follow it.
        alone[handle].handles = [handle]
        if handle < 3:
            assert admit(engine, pool, rows, seed=handle) == handle
    steps_alone = dict(lengths)

    def step_and_compare() -> None:
        for handle, logits in decode_all(engine, pool, steps).items():
            expected = decode_all(engine, alone[handle], steps_alone)[handle]
            assert_close(logits, expected)

    for _ in range(3):
        step_and_compare()
    pool.release(0)
    assert pool.handles == [2, 1]
    for _ in range(3):
        step_and_compare()
    assert admit(engine, pool, lengths[3], seed=3) == 3
    steps[3] = lengths[3]
    for _ in range(3):
        step_and_compare()


def test_method_full_is_bit_identical_to_decoding_in_place(engine: OrtEngine) -> None:
    """The pool has another capacity, another slot, and rows of an earlier sequence in it."""
    arena, _ = prefilled(engine, 20)
    in_place = Pool(arena.kv, handles=[0])
    pool = engine.new_pool(2, 200)
    pool.kv.keys[:], pool.kv.values[:] = 1e3, 1e3
    first, handle = pool.acquire(), pool.acquire()
    engine.compress(arena, pool, handle, text_rows(20), KvPolicy())
    pool.release(first)
    for step in range(4):
        embeds, tables = random_embeds(1, step), rope(engine, positions(1, 20 + step))
        np.testing.assert_array_equal(
            engine.decode(pool, embeds, tables), engine.decode(in_place, embeds, tables)
        )
    assert (pool.kv.lengths[:, 0] == 24).all()


def test_embedding_rows_and_ids_outside(tiny: TinyModel, engine: OrtEngine) -> None:
    weight = tiny.model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(engine.embed([5, 0, VOCAB - 1]), weight[[5, 0, VOCAB - 1]])
    for wrong in (-1, VOCAB):
        with pytest.raises(EngineError, match=f"token id {wrong} is outside"):
            engine.embed([0, wrong, 1])


def full_slot(engine: OrtEngine) -> None:
    pool = engine.new_pool(1, 64)
    admit(engine, pool, 64, seed=0)
    engine.decode(pool, random_embeds(1), rope(engine, positions(1)))


def small_slot(engine: OrtEngine) -> None:
    pool = engine.new_pool(1, 64)
    admit(engine, pool, 65, seed=0)


def unknown_method(engine: OrtEngine) -> None:
    pool = engine.new_pool(1, 64)
    engine.compress(prefilled(engine, 3)[0], pool, pool.acquire(), text_rows(3), KvPolicy("magic"))


def overfull_arena(engine: OrtEngine) -> None:
    arena, _ = prefilled(engine, 60)
    engine.prefill(arena, random_embeds(5), rope(engine, positions(5)))


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (full_slot, "filled its slot of 64 rows"),
        (small_slot, "65 kept rows do not fit a slot of 64"),
        (unknown_method, "no KV method 'magic'; it has: full"),
        (overfull_arena, "prefill of 5 rows behind 60 exceeds the arena of 64 rows"),
        (lambda engine: engine.new_arena(513), "513 KV rows are needed, but tiny was built for 512"),
        (lambda engine: engine.new_pool(2, 513), "513 KV rows are needed, but tiny was built for 512"),
        (lambda engine: prefilled(engine, 0), "at least one row"),
    ],
)
def test_misuse_is_refused(engine: OrtEngine, misuse: Callable[[OrtEngine], None], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        misuse(engine)


def test_embeddings_of_another_batch_size_are_refused(engine: OrtEngine) -> None:
    """numpy would silently give every sequence the same token."""
    pool = engine.new_pool(2, 64)
    tables = rope(engine, positions(1))
    with pytest.raises(ValueError, match="for 0 sequences"):
        engine.decode(pool, random_embeds(1), tables)
    for seed in range(2):
        admit(engine, pool, 4, seed)
    with pytest.raises(ValueError, match="for 2 sequences"):
        engine.decode(pool, random_embeds(1), tables)


def test_a_dropped_pool_gives_its_memory_back(engine: OrtEngine) -> None:
    pool = engine.new_pool(1, 64)
    admit(engine, pool, 4, seed=0)
    engine.decode(pool, random_embeds(1), rope(engine, positions(1)))
    keys = weakref.ref(pool.kv.keys)
    del pool
    gc.collect()
    assert keys() is None


def test_text_positions_need_no_sections(engine: OrtEngine) -> None:
    tables = rope(engine, text_positions(4).values)
    assert tables.cos.shape == (1, 4, engine.manifest.text.head_dim // 2)
    assert engine.new_arena(1).kv.lengths.shape == (LAYERS, 1)
