# SPDX-License-Identifier: Apache-2.0
"""The GPUs' engine with the kernels' library built for the processor: the rows that the ONNX graphs keep."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TinyModel
from kernel_library import built_for_the_processor
from test_ort_device import PROMPT, cache_of, compressed, decode

from starkv.errors import EngineError
from starkv.export.build.ort import build_ort_engine
from starkv.kernels.library_paths import KERNELS, LIBRARY_VARIABLE
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.engines.device_kv import device_kv
from starkv.runtime.engines.kernel_compress import find_kernels
from starkv.runtime.engines.ort_cuda import OrtDeviceEngine
from starkv.runtime.kv.buffers import Arena
from starkv.runtime.kv.policy import KvPolicy

POLICY = KvPolicy(STAR_KV, Budget(ratio=0.4))


@pytest.fixture(scope="module")
def library() -> Path:
    return built_for_the_processor("starkv_kernels_cpu", KERNELS["cpu"])


@pytest.fixture
def named_library(library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    return library


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_library_keeps_what_the_graphs_keep(
    tiny: TinyModel, named_library: Path, tmp_path: Path, dtype: str
) -> None:
    """Three prompts of one trajectory: rows, cache, scores and what is remembered."""
    build_ort_engine(tiny.exports["fp32"], tmp_path / "engine", compute_dtype=dtype)
    with_library = OrtDeviceEngine(tmp_path / "engine", threads=1, device="cpu")
    assert with_library.compresses_on_device
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(LIBRARY_VARIABLE)
        patch.setattr("starkv.runtime.engines.ort_cuda.find_kernels", lambda _: None)
        without = OrtDeviceEngine(tmp_path / "engine", threads=1, device="cpu")
    assert not without.compresses_on_device
    ours = theirs = None
    for _ in range(3):
        memories = [None if result is None else result.memory for result in (ours, theirs)]
        (pool, ours), (expected_pool, theirs) = (
            compressed(engine, POLICY, memory=memory)
            for engine, memory in zip((with_library, without), memories, strict=True)
        )
        np.testing.assert_array_equal(pool.kv.lengths, expected_pool.kv.lengths)
        kept = int(pool.kv.lengths.max())
        np.testing.assert_array_equal(ours.rows[:, :, :kept], theirs.rows[:, :, :kept])
        for actual, expected in zip(cache_of(pool), cache_of(expected_pool), strict=True):
            np.testing.assert_array_equal(actual[:, 1, :, :kept], expected[:, 1, :, :kept])
        np.testing.assert_array_equal(pool.kv.row_meta[:, 1, :kept], expected_pool.kv.row_meta[:, 1, :kept])
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-3, atol=1e-5)
        assert ours.memory is not None
        assert theirs.memory is not None
        assert ours.memory.progress == theirs.memory.progress
        for name in ("mi_ema", "pattern_ema", "temperature"):
            np.testing.assert_allclose(
                getattr(ours.memory, name), getattr(theirs.memory, name), rtol=1e-3, atol=1e-5
            )
    np.testing.assert_array_equal(
        decode(with_library, pool, PROMPT.length), decode(without, expected_pool, PROMPT.length)
    )


def test_keys_that_are_not_numbers_are_an_error(tiny: TinyModel, named_library: Path) -> None:
    engine = OrtDeviceEngine(tiny.engine, threads=1, device="cpu")

    def spoil(arena: Arena) -> None:
        keys = device_kv(arena.kv).keys
        keys.write(np.full(keys.shape, np.nan, np.float32))

    with pytest.raises(EngineError, match="KV scores of layer 0 are not numbers"):
        compressed(engine, POLICY, spoil=spoil)


def test_a_library_for_another_device_is_passed_over(
    tiny: TinyModel, named_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = find_kernels("cuda")
    assert found is None or found.device == "cuda"
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "missing.so"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("starkv.kernels.library_paths.BUILD_DIRECTORY", Path("nowhere"))
    assert find_kernels("cpu") is None
    assert not OrtDeviceEngine(tiny.engine, threads=1, device="cpu").compresses_on_device
