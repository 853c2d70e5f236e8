# SPDX-License-Identifier: Apache-2.0
"""KV compression, the command's way in and measurements, on a TensorRT engine."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from runtime_cases import Engines, Kernels, open_on, prefilled, rope, step, tokens

from starkv.errors import EngineError, UsageError
from starkv.manifest import read_manifest
from starkv.methods.budget import Budget
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.methods.rows import prompt_rows
from starkv.runtime import benchmark
from starkv.runtime.engines import trt
from starkv.runtime.engines.base import Engine
from starkv.runtime.engines.device_kv import device_kv
from starkv.runtime.engines.opening import open_engine
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.engines.trt_opening import open_host_graph
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy

PROMPT = prompt_rows(130, [(20, 84)], [(8, 8)], range(8))
"""A screenshot of 8x8 tokens in 130 rows."""
ON_HOST = tuple(method for method in ENGINE_METHODS if method not in (FULL, STAR_KV))


@pytest.fixture
def engine(engines: Engines) -> TrtEngine:
    return engines.open()


def compressed(engine: Engine, method: str, ratio: float = 0.5) -> tuple[Pool, Compressed]:
    """The prompt in the second slot of a pool."""
    arena, _ = prefilled(engine, tokens(PROMPT.length))
    policy = KvPolicy(method, Budget(ratio) if method != FULL else Budget())
    pool = engine.new_pool(2, PROMPT.length + 20, method)
    pool.acquire()
    return pool, engine.compress(arena, pool, pool.acquire(), PROMPT, policy)


def shared(ours: Compressed, theirs: Compressed) -> float:
    """Share of the rows that both keep."""
    pairs = zip(ours.rows[:, 0], theirs.rows[:, 0], strict=True)
    return float(np.mean([len(np.intersect1d(a[a >= 0], b[b >= 0])) / (b >= 0).sum() for a, b in pairs]))


@pytest.mark.parametrize("method", ENGINE_METHODS)
def test_every_method_keeps_what_it_keeps_in_float32(engine: TrtEngine, host: OrtEngine, method: str) -> None:
    (pool, ours), (expected, theirs) = (compressed(each, method) for each in (engine, host))
    # Scores differ by the rounding of 16 bits: rows at the edge of the budget may change places, and entropy
    # may move a row between layers.
    assert pool.kv.lengths.sum() == expected.kv.lengths.sum()
    np.testing.assert_allclose(pool.kv.lengths, expected.kv.lengths, atol=1 if method == STAR_KV else 0)
    assert shared(ours, theirs) >= (0.9 if ours.scores is not None else 1.0)


@pytest.mark.parametrize("method", [STAR_KV, *ON_HOST])
def test_kept_rows_are_copied_bit_for_bit(engine: TrtEngine, method: str) -> None:
    arena, _ = prefilled(engine, tokens(PROMPT.length))
    source = device_kv(arena.kv)
    pool = engine.new_pool(2, PROMPT.length, method)
    pool.acquire()
    result = engine.compress(arena, pool, pool.acquire(), PROMPT, KvPolicy(method, Budget(0.5)))
    target = device_kv(pool.kv)
    for before, after in (
        (source.keys.read(), target.keys.read()),
        (source.values.read(), target.values.read()),
    ):
        for layer, rows in enumerate(result.rows):
            # One index set per layer, or one per KV head.
            for group in range(before.shape[2]):
                kept = rows[group if len(rows) > 1 else 0]
                kept = kept[kept >= 0]
                np.testing.assert_array_equal(
                    after[layer, 1, group, : len(kept)], before[layer, 0, group, kept]
                )


def test_decoding_goes_on_behind_kept_rows(engine: TrtEngine, host: OrtEngine) -> None:
    logits = []
    for each in (engine, host):
        pool, _ = compressed(each, FULL)
        pool.release(pool.handles[0])
        logits.append(step(each, pool, tokens(1), PROMPT.length))
    assert np.abs(logits[0] - logits[1]).max() < 0.05 * np.abs(logits[1]).max()


def test_star_kv_runs_on_the_card(engine: TrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches stay where they are: what comes back is small."""
    monkeypatch.setattr(trt, "open_host_graph", None)
    cuda: Any = engine._cuda
    arena, _ = prefilled(engine, tokens(PROMPT.length))
    pool = engine.new_pool(1, PROMPT.length, STAR_KV)
    with cuda.counted():
        engine.compress(arena, pool, pool.acquire(), PROMPT, KvPolicy(STAR_KV, Budget(0.5)))
        assert max(cuda.downloads) < pool.kv.bytes_held / 4
    assert not engine._trt_compressor._sessions


def test_without_onnxruntime_there_are_the_cards_own_methods(
    engine: TrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert engine.info.kv_methods == (FULL, STAR_KV)
    with pytest.raises(UsageError, match="no KV method 'snapkv'; it has: full, star_kv"):
        engine.new_pool(1, 64, "snapkv")
    with pytest.raises(EngineError, match=r"needs ONNX Runtime; pip install 'starkv\[cpu\]', or use star_kv"):
        open_host_graph(engine._directory, 1, "compact")


def test_a_host_graph_that_is_damaged(engines: Engines, tmp_path: Path) -> None:
    directory = shutil.copytree(engines.directory(), tmp_path / "engine")
    (directory / "compact.onnx").write_bytes(b"no graph")
    engine = open_on(engines.install(), directory)
    with pytest.raises(EngineError, match=r"can't load .*compact.onnx"):
        engine.most_kept_rows(100, KvPolicy("streaming_llm", Budget(0.5)))


def test_arenas_of_other_engines_are_refused(engine: TrtEngine, host: OrtEngine) -> None:
    with pytest.raises(UsageError, match="another engine's"):
        engine.prefill(
            host.new_arena(8), np.zeros((4, engine.manifest.text.hidden), np.float32), rope(engine, 4)
        )


# --- the way in ---


@pytest.fixture
def found(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> TrtEngine:
    """An engine that was opened as the command does it."""
    directory = engines.directory()
    state = engines.install()
    kernels: Any = Kernels(state.cuda)
    monkeypatch.setattr(trt, "CudaPython", lambda: state.cuda)
    monkeypatch.setattr(trt, "kernels_beside", lambda _: kernels)
    engine = open_engine(directory, verify=True)
    assert isinstance(engine, TrtEngine)
    return engine


def test_a_directory_says_what_opens_it(found: TrtEngine) -> None:
    info = found.info
    assert (info.backend, info.device, info.compute_dtype) == ("trt", "NVIDIA H100", "bfloat16")
    text = found.manifest.text
    assert info.kv_bytes_per_row == 2 * text.layers * text.kv_heads * text.head_dim * 2
    assert found.picks_on_device
    assert found.captures_graphs


def test_measurements_are_of_the_card(found: TrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        def copy_bandwidth(self) -> float:
            return 3e12

        def memory_in_use(self) -> int:
            return 5 << 20

    monkeypatch.setattr(benchmark, "CudaDevice", Card)
    assert benchmark.bandwidth_of(found) == 3e12
    assert benchmark.peak_of(found) == 5
    manifest = read_manifest(found._directory)
    assert manifest.tensorrt
    weights = benchmark.decoder_bytes(found._directory)
    assert weights == manifest.tensorrt.weight_bytes["decoder"] > 0
    cuda: Any = found._cuda
    with cuda.counted():
        runner = benchmark.Benchmark(found, weights, 1, KvPolicy(STAR_KV, Budget(0.5)))
        measured = [*runner.run([40], [3], [64], (56, 56))]
        assert 4 in cuda.downloads, "tokens are picked on the card, as in a reply"
    assert [row.test for row in measured] == ["vit224x224", "pp40 @ d64", "kv104→52", "tg3 @ d64→32"]
    assert all(row.peak_mib == 5 for row in measured)


def test_layers_are_timed_by_what_runs(engine: TrtEngine) -> None:
    cuda: Any = engine._cuda
    with engine.timed_layers() as times:
        pool, _ = compressed(engine, STAR_KV)
        pool.release(pool.handles[0])
        for index in range(3):
            step(engine, pool, tokens(1, index), 130 + index)
        assert not any(cuda.queued.values()), "runs wait meanwhile"
    assert times.keys() == {"vision", "decoder.prefill", "decoder.decode", "compress"}
    assert not times["vision"]
    assert len(times["compress"]) == 1
    assert times["decoder.prefill"].keys() == times["decoder.decode"].keys()
    with cuda.counted():
        for index in range(2):
            step(engine, pool, tokens(1, index), 140 + index)
        assert (cuda.captures, cuda.launches) == (1, 1), "and are graphs again afterwards"


def test_memory_goes_back_after_looking(engines: Engines) -> None:
    cuda = FakeCuda()
    engine = engines.open(cuda=cuda, debug_layers=("layers.*/Add_*",))
    with engine.watched_layers() as values:
        prefilled(engine, tokens(20))
    assert values
    with engine.watched_layers() as values:
        pass
    assert not values
    del engine
    assert cuda.leaks() == []


def test_rows_that_wait_go_back_to_the_card_in_their_places(engine: TrtEngine) -> None:
    arena, _ = prefilled(engine, tokens(PROMPT.length))
    arena.kv.row_meta[:, 0, : PROMPT.length] = PROMPT.row_meta
    whole = arena.kv.park(0)
    layers, numbers = len(whole.keys), np.arange(PROMPT.length)
    waiting = arena.kv.park_some(0, [numbers[layer % 2 :: 2] for layer in range(layers)])
    kept = whole.take([numbers[1 - layer % 2 :: 2] for layer in range(layers)])
    arena.reset()
    arena.kv.load(0, kept)
    arena.kv.load(0, arena.kv.park(0).merged(waiting))
    back = arena.kv.park(0)
    for name in ("keys", "values", "row_meta", "positions"):
        for mine, theirs in zip(getattr(back, name), getattr(whole, name), strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine.astype(np.float32), theirs.astype(np.float32))
