# SPDX-License-Identifier: Apache-2.0
"""Decoding on TensorRT: several sequences at once, graphs against plain runs, tokens picked on the card."""

from typing import Any

import numpy as np
import pytest
from fake_tensorrt.context import IExecutionContext
from runtime_cases import Engines, admit, batch_rope, prefilled, step, tokens

from starkv.errors import UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.engines import trt_pools
from starkv.runtime.engines.base import Engine
from starkv.runtime.engines.device_kv import device_kv
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.engines.trt_kv import POOL_STEP
from starkv.runtime.generation import Sampler, SamplingParameters
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.policy import KvPolicy

LENGTHS = (13, 150, 41)
"""Rows of prompts; one is longer than a prefill call."""
GREEDY = SamplingParameters()


@pytest.fixture
def engine(engines: Engines) -> TrtEngine:
    return engines.open()


def filled(engine: Engine, lengths: tuple[int, ...] = LENGTHS) -> Pool:
    pool = engine.new_pool(len(lengths), max(lengths) + 20)
    for seed, length in enumerate(lengths):
        admit(engine, pool, tokens(length, seed))
    return pool


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Within what 16 bits leave of random tokens' logits."""
    return bool(np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max())


def test_a_prefill_in_chunks_is_the_host_engines(engine: TrtEngine, host: OrtEngine) -> None:
    ids = tokens(150)
    (arena, ours), (expected, theirs) = prefilled(engine, ids), prefilled(host, ids)
    assert close(ours, theirs)
    assert (arena.kv.lengths == 150).all()
    np.testing.assert_allclose(arena.hidden_norm[..., :150], expected.hidden_norm[..., :150], rtol=0.05)


def test_a_batch_of_different_lengths_is_the_host_engines(engine: TrtEngine, host: OrtEngine) -> None:
    """A sequence leaves, the last takes its slot, and another comes."""
    pools = {each: filled(each) for each in (engine, host)}
    for index in range(7):
        if index == 3:
            for pool in pools.values():
                pool.release(0)
        if index == 5:
            for each, pool in pools.items():
                admit(each, pool, tokens(33, 7))
        ids = tokens(pools[host].active, 20 + index)
        ours, theirs = (step(each, pool, ids, 160 + index) for each, pool in pools.items())
        assert close(ours, theirs), index
    assert pools[engine].handles == pools[host].handles == [2, 1, 3]
    np.testing.assert_array_equal(pools[engine].kv.lengths, pools[host].kv.lengths)


def test_a_sequence_is_the_same_alone_and_among_others(engine: TrtEngine) -> None:
    together, alone = filled(engine), filled(engine, LENGTHS[:1])
    for index in range(4):
        ids = tokens(3, 40 + index)
        both = step(engine, together, ids, 160), step(engine, alone, ids[:1], 160)
        np.testing.assert_allclose(both[0][0], both[1][0], rtol=0.02, atol=0.05)


def test_a_graph_is_a_plain_run_to_the_bit(engine: TrtEngine) -> None:
    """Also when prefills and images of others run in between, in the same memory for activations."""
    graphs, plain = filled(engine), filled(engine)
    cuda: Any = engine._cuda
    for index in range(5):
        ids = tokens(3, 60 + index)
        with engine.without_graphs():
            expected = step(engine, plain, ids, 170 + index)
        with cuda.counted():
            np.testing.assert_array_equal(step(engine, graphs, ids, 170 + index), expected)
            assert cuda.launches == (1 if index else 0)
        prefilled(engine, tokens(100, index))


def test_a_context_is_left_alone_once_its_run_is_captured(
    engine: TrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's developer guide, CUDA graphs: whoever changes the context makes the graph undefined."""
    captured: list[IExecutionContext] = []
    cuda: Any = engine._cuda
    execute = IExecutionContext.execute_async_v3

    def note(context: IExecutionContext, stream: int) -> bool:
        if stream in cuda.capturing:
            captured.append(context)
        else:
            assert all(context is not other for other in captured), "run by hand after its capture"
        return execute(context, stream)

    monkeypatch.setattr(IExecutionContext, "execute_async_v3", note)
    for name in ("set_input_shape", "set_tensor_address", "set_device_memory"):
        change = getattr(IExecutionContext, name)

        def refuse(context: IExecutionContext, *arguments: Any, change: Any = change) -> Any:
            assert all(context is not other for other in captured), "changed after its capture"
            return change(context, *arguments)

        monkeypatch.setattr(IExecutionContext, name, refuse)
    large, small = filled(engine), filled(engine, LENGTHS[:1])
    for index in range(3):
        step(engine, large, tokens(3, index), 160)
        step(engine, small, tokens(1, index), 160)
        prefilled(engine, tokens(20))
    assert len(captured) == 2


def test_steps_in_excess_make_room(engine: TrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_pools, "MOST_STEPS", 2)
    cuda: Any = engine._cuda
    pool = engine.new_pool(4, 64)
    held = []
    for index in range(4):
        admit(engine, pool, tokens(10 + index, index))
        for _ in range(2):
            step(engine, pool, tokens(index + 1), 30)
        held.append(cuda.in_use)
    assert list(device_kv(pool.kv).steps) == [3, 4]
    pool.release(pool.handles[-1])
    with cuda.counted():
        step(engine, pool, tokens(3), 40)
        assert cuda.launches == 1, "the third is still there"
    pool.release(pool.handles[-1])
    step(engine, pool, tokens(2), 40)
    assert list(device_kv(pool.kv).steps) == [3, 2], "the least used one went"


def test_a_run_that_cant_be_recorded_goes_kernel_by_kernel(
    engine: TrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda: Any = engine._cuda
    execute = IExecutionContext.execute_async_v3

    def refuse(context: IExecutionContext, stream: int) -> bool:
        return False if stream in cuda.capturing else execute(context, stream)

    expected, pool = filled(engine), filled(engine)
    with engine.without_graphs():
        logits = [step(engine, expected, tokens(3, index), 160 + index) for index in range(4)]
    monkeypatch.setattr(IExecutionContext, "execute_async_v3", refuse)
    for index in range(4):
        np.testing.assert_array_equal(step(engine, pool, tokens(3, index), 160 + index), logits[index])
    assert not engine.captures_graphs
    assert not cuda.capturing


@pytest.mark.parametrize("sessions", [1, 3])
def test_a_step_costs_one_upload_and_four_bytes_per_sequence(engine: TrtEngine, sessions: int) -> None:
    cuda: Any = engine._cuda
    pool = filled(engine, LENGTHS[:sessions])
    samplers = [Sampler(GREEDY) for _ in range(sessions)]
    for index in range(4):
        ids = tokens(sessions, index)
        with cuda.counted():
            engine.decode_tokens(pool, engine.embed(ids), batch_rope(engine, [160] * sessions), samplers)
            assert (cuda.downloads, len(cuda.uploads)) == ([4 * sessions], 1)


def replies(engine: Engine, parameters: SamplingParameters, count: int = 8) -> list[list[int]]:
    """Tokens that follow on three prompts at once."""
    pool = filled(engine)
    samplers = [Sampler(parameters) for _ in LENGTHS]
    chosen = [tokens(len(LENGTHS), 90)]
    for index in range(count):
        tables = batch_rope(engine, [length + index for length in LENGTHS])
        chosen.append(engine.decode_tokens(pool, engine.embed(chosen[-1]), tables, samplers))
    return chosen


def test_tokens_picked_on_the_card_are_those_picked_on_the_host(engine: TrtEngine) -> None:
    picked = replies(engine, GREEDY)
    engine._decode_parts.kernels = None
    assert not engine.picks_on_device
    assert replies(engine, GREEDY) == picked


def test_a_seed_makes_drawing_repeatable(engine: TrtEngine) -> None:
    drawn = [replies(engine, SamplingParameters(temperature=2.0, seed=seed)) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    narrow = SamplingParameters(temperature=2.0, top_p=1e-6, seed=3)
    assert replies(engine, narrow) == replies(engine, GREEDY), "the likeliest alone is left"


def test_a_batch_may_draw_and_take_the_likeliest(engine: TrtEngine) -> None:
    ids, logits = tokens(3, 5), step(engine, filled(engine), tokens(3, 5), 160)
    samplers = [Sampler(GREEDY), Sampler(SamplingParameters(temperature=5.0, seed=1)), Sampler(GREEDY)]
    picked = engine.decode_tokens(filled(engine), engine.embed(ids), batch_rope(engine, [160] * 3), samplers)
    likeliest = logits.argmax(1)
    assert picked[::2] == list(likeliest[::2])
    with pytest.raises(ValueError, match="argument"):
        engine.decode_tokens(filled(engine), engine.embed(ids), batch_rope(engine, [160] * 3), samplers[:2])


def test_the_full_budget_changes_no_bit(engine: TrtEngine) -> None:
    results = []
    for policy in (KvPolicy(), KvPolicy(STAR_KV, Budget(1.0))):
        pool = engine.new_pool(1, 200)
        admit(engine, pool, tokens(120), policy)
        results.append([step(engine, pool, tokens(1, index), 120 + index) for index in range(3)])
    np.testing.assert_array_equal(*results)


def test_capacities_come_in_steps_up_to_the_engines(engine: TrtEngine) -> None:
    limit = engine.manifest.max_context
    assert engine.new_pool(1, 65).kv.capacity == POOL_STEP
    assert engine.new_pool(1, limit).kv.capacity == engine._build.cache_rows >= limit
    with pytest.raises(UsageError, match=f"built for {limit} at most"):
        engine.new_pool(1, limit + 1)
    with pytest.raises(UsageError, match="more --sessions"):
        engine.new_pool(engine._build.sessions + 1, 64)


def test_float16_says_what_the_host_says(engines: Engines, host: OrtEngine) -> None:
    engine = engines.open(compute_dtype="float16")
    pools = {each: filled(each) for each in (engine, host)}
    for index in range(3):
        ours, theirs = (step(each, pool, tokens(3, index), 160) for each, pool in pools.items())
        assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()
