# SPDX-License-Identifier: Apache-2.0
"""What several tests of TensorRT start from."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import install
from fake_tensorrt.state import Current, State
from runtime_cases import Engines
from small_engines import (
    ATTENDING_SHAPES,
    CHAINED_SHAPES,
    PACKING_SHAPES,
    SCALED_SHAPES,
    Small,
    attending,
    chained,
    packing,
    scaled,
    trt,
)
from trt_engines import Exports, plugin_library

from starkv.runtime.engines.ort import OrtEngine


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """gui-tiny, exported once."""
    return Exports.make(tmp_path_factory.mktemp("gui-tiny"))


@pytest.fixture(autouse=True)
def no_violations() -> Iterator[None]:
    """Fail a test in which the fake TensorRT found something wrong where it could not raise."""
    Current.violations.clear()
    yield
    assert Current.violations == []


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what fakes measure out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> State:
    """TensorRT 10.3 with the plugins loaded."""
    installed = install(monkeypatch, cuda=FakeCuda())
    assert trt().get_plugin_registry().load_library(str(plugin_library(tmp_path))) is not None
    return installed


@pytest.fixture
def times(state: State, tmp_path: Path) -> Small:
    """Multiplies by 3."""
    return Small(scaled(tmp_path / "scaled.onnx"), SCALED_SHAPES, state.cuda.new_stream(), state.cuda)


@pytest.fixture
def attention(state: State, tmp_path: Path) -> Small:
    """One KVAttention."""
    return Small(attending(tmp_path / "a.onnx"), ATTENDING_SHAPES, state.cuda.new_stream(), state.cuda)


@pytest.fixture
def packable(state: State, tmp_path: Path) -> Small:
    """One PackableKVAttention."""
    return Small(packing(tmp_path / "p.onnx"), PACKING_SHAPES, state.cuda.new_stream(), state.cuda)


@pytest.fixture
def chain(state: State, tmp_path: Path) -> Small:
    """Three layers."""
    return Small(chained(tmp_path / "c.onnx"), CHAINED_SHAPES, state.cuda.new_stream(), state.cuda)


@pytest.fixture
def engines(
    exports: Exports, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Engines:
    """gui-tiny's TensorRT engines, each form built once."""
    return Engines(exports, tmp_path_factory.getbasetemp() / "trt-engines", monkeypatch)


@pytest.fixture(scope="session")
def host(exports: Exports) -> OrtEngine:
    """gui-tiny on the processor, in float32."""
    return OrtEngine(exports.processor_engine, threads=1)


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """A process that a shell starts in the background is told to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
