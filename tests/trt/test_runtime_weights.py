# SPDX-License-Identifier: Apache-2.0
"""Engines whose weights are not in their plans, or not on the card."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda
from runtime_cases import Engines, admit, open_on, step, tokens

from starkv.errors import EngineError
from starkv.manifest import Manifest, read_manifest
from starkv.runtime.engines.base import kv_bytes_per_row
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.engines.trt_memory import WEIGHTS_VARIABLE

MIB = 1 << 20


def some_logits(engine: TrtEngine, steps: int = 3) -> np.ndarray:
    pool = engine.new_pool(1, 100)
    admit(engine, pool, tokens(40))
    return np.array([step(engine, pool, tokens(1, index), 40 + index) for index in range(steps)])


# --- stripped plans ---


@pytest.mark.parametrize("preset", ["fp32", "int4"])
@pytest.mark.parametrize("version", ["10.3.0.26", "11.1.0.106"])
def test_a_stripped_engine_computes_what_a_whole_one_does(
    engines: Engines, version: str, preset: str
) -> None:
    whole = engines.directory(preset, version)
    stripped = engines.directory(preset, version, strip=True)
    sizes = [(path / "decoder.plan").stat().st_size for path in (stripped, whole)]
    assert sizes[0] < sizes[1] / 2
    logits = [some_logits(open_on(engines.install(version), path)) for path in (stripped, whole)]
    np.testing.assert_array_equal(*logits)


def other_weights(directory: Path) -> None:
    graph = onnx.load(directory / "decoder.onnx", load_external_data=False)
    del graph.graph.initializer[:3]
    onnx.save(graph, directory / "decoder.onnx")


SPOILED: dict[str, Callable[[Path], object]] = {
    "no graph": lambda directory: (directory / "decoder.onnx").unlink(),
    "no data": lambda directory: (directory / "decoder.data").unlink(),
    "no weights": other_weights,
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_weights_that_are_not_there(
    engines: Engines, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    directory = shutil.copytree(engines.directory(strip=True), tmp_path / "engine")
    spoil(directory)
    state = engines.install()
    with pytest.raises(EngineError, match=r"the weights of decoder.onnx do not fit decoder.plan: .*again"):
        open_on(state, directory)


# --- streamed weights ---


def scratch_of(manifest: Manifest) -> int:
    assert manifest.tensorrt
    return max(manifest.tensorrt.scratch_bytes.values())


def test_weights_that_fit_lie_on_the_card(engines: Engines) -> None:
    engine = engines.open(weight_streaming=True)
    assert not any(plan.streams for plan in engine.plans.values())
    assert engine.captures_graphs, "nothing comes from the host at each run"


def test_weights_make_room_for_the_longest_prompt(engines: Engines) -> None:
    """The decoder's go first: it reads them for every token."""
    directory = engines.directory(weight_streaming=True)
    manifest = read_manifest(directory)
    assert manifest.tensorrt
    decoder = manifest.tensorrt.weight_bytes["decoder"]
    caches = 2 * manifest.max_context * kv_bytes_per_row(manifest)
    for share, graphs in ((decoder // 2, False), (decoder, True)):
        cuda = FakeCuda(total=caches + scratch_of(manifest) + share)
        engine = open_on(engines.install(cuda=cuda), directory)
        assert engine.plans["decoder"].streams == (not graphs)
        assert engine.plans["vision"].streams
        assert engine.captures_graphs == graphs
        assert cuda.reserved <= share
        del engine
        assert cuda.leaks() == []


def test_streamed_weights_compute_the_same_without_graphs(engines: Engines) -> None:
    expected = some_logits(engines.open())
    cuda = FakeCuda()
    directory = engines.directory(weight_streaming=True)
    engine = open_on(engines.install(cuda=cuda), directory, weight_budget=0)
    assert not engine.captures_graphs
    with cuda.counted():
        np.testing.assert_array_equal(some_logits(engine), expected)
        assert (cuda.launches, cuda.captures) == (0, 0)


def test_the_environment_says_how_much(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = engines.directory(weight_streaming=True)
    decoder = read_manifest(directory).tensorrt
    assert decoder
    monkeypatch.setenv(WEIGHTS_VARIABLE, "1")
    cuda = FakeCuda()
    engine = open_on(engines.install(cuda=cuda), directory)
    assert engine.plans["decoder"].streams
    assert cuda.reserved <= MIB
    monkeypatch.setenv(WEIGHTS_VARIABLE, "4096")
    assert not open_on(engines.install(), directory).plans["decoder"].streams


def test_a_card_too_small_even_for_streams(engines: Engines) -> None:
    directory = engines.directory(weight_streaming=True)
    state = engines.install(cuda=FakeCuda(total=2 * MIB))
    with pytest.raises(EngineError, match=f"0 for weights.*set {WEIGHTS_VARIABLE} lower"):
        open_on(state, directory)
