# SPDX-License-Identifier: Apache-2.0
"""The card's memory under a TensorRT engine: it goes back by itself, and where there is none it is said what
it was for."""

import pytest
from fake_cuda import FakeCuda
from runtime_cases import Engines, admit, prefilled, step, tokens

from starkv.errors import EngineError
from starkv.runtime.engines.device_kv import device_kv
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.kv.buffers import Pool


def admitted(engine: TrtEngine) -> Pool:
    """Three sequences."""
    pool = engine.new_pool(3, 100)
    for seed in range(3):
        admit(engine, pool, tokens(20 + seed, seed))
    return pool


@pytest.mark.parametrize("version", ["10.3.0.26", "11.1.0.106"])
def test_memory_goes_back_without_waiting_for_the_collector(engines: Engines, version: str) -> None:
    cuda = FakeCuda()
    engine = engines.open(version, cuda)
    pool = admitted(engine)
    for index in range(3):
        step(engine, pool, tokens(3, index), 160)
    assert cuda.in_use > 0
    graphs = device_kv(pool.kv).steps[3]._graphs
    (graph,) = graphs
    del pool
    assert graph.alive, "the next pool of this size uses it"
    del engine
    assert not graph.alive
    assert cuda.leaks() == []
    assert not any(cuda.queued.values())


def test_a_pool_outlives_its_engine_in_peace(engines: Engines) -> None:
    cuda = FakeCuda()
    engine = engines.open(cuda=cuda)
    pool = admitted(engine)
    step(engine, pool, tokens(3), 160)
    del engine
    del pool
    assert cuda.leaks() == []


def test_a_spare_pool_makes_room(engines: Engines) -> None:
    """Memory that is only kept for later is given up before anything is refused."""
    cuda = FakeCuda()
    engine = engines.open(cuda=cuda)
    pool = engine.new_pool(4, 500)
    spare = pool.kv.bytes_reserved
    del pool
    cuda.total = cuda.in_use + cuda.reserved + 1000
    arena = engine.new_arena(300)
    assert 1000 < arena.kv.bytes_reserved < spare
    with pytest.raises(EngineError, match="no room for the prompt's KV rows"):
        engine.new_arena(2000)


def test_a_card_without_room_for_the_engine(engines: Engines) -> None:
    directory = engines.directory()
    engines.install()
    cuda = FakeCuda(total=8 << 20)
    with pytest.raises(EngineError) as caught:
        TrtEngine(directory, verify=False, cuda=cuda)
    message = str(caught.value)
    assert cuda.leaks() == []
    assert "MiB of device memory for a short prompt" in message
    assert "for weights" in message
    for knob in ("--max-pixels", "--prefill-rows", "--sessions", "--weight-streaming"):
        assert knob in message


def test_a_card_without_room_for_a_prompt(engines: Engines) -> None:
    cuda = FakeCuda()
    engine = engines.open(cuda=cuda)
    cuda.total = cuda.in_use + cuda.reserved + (1 << 20)
    with pytest.raises(EngineError, match=r"no room for the prompt's KV rows, 6 MiB: .*smaller images"):
        engine.new_arena(2000)
    with pytest.raises(EngineError, match=r"sessions' KV rows, 24 MiB: .*--kv-budget, --kv-capacity"):
        engine.new_pool(4, 2000)
    before = cuda.in_use
    arena, _ = prefilled(engine, tokens(10))
    assert arena.kv.lengths.max() == 10
    del arena
    assert cuda.in_use == before
