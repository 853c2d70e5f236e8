# SPDX-License-Identifier: Apache-2.0
"""CUDA through cuda-python: what is called with which arguments, and what is said where it fails.

Neither a card nor its driver is here: the package's functions are there and their parameters are compared;
what they would do is scripted.
"""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scripted_cuda import (
    CONSTANTS,
    FAILED,
    FREE,
    OLD_DRIVER,
    OUT_OF_MEMORY,
    STREAM,
    TOTAL,
    Script,
)

from starkv.errors import EngineError
from starkv.runtime.engines import cuda_python
from starkv.runtime.engines.cuda_python import CudaPython


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    package = ModuleType("cuda.bindings")
    package.runtime = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    return made


@pytest.fixture
def cuda(script: Script) -> CudaPython:
    made = CudaPython()
    script.calls.clear()
    return made


# --- the package itself ---


CALLS = {
    "cudaGetDeviceCount": 0,
    "cudaMalloc": 1,
    "cudaFree": 1,
    "cudaMallocHost": 1,
    "cudaFreeHost": 1,
    "cudaMemGetInfo": 0,
    "cudaDeviceGetAttribute": 2,
    "cudaStreamCreateWithFlags": 1,
    "cudaStreamSynchronize": 1,
    "cudaMemcpyAsync": 5,
    "cudaMemcpy2DAsync": 8,
    "cudaMemsetAsync": 4,
    "cudaStreamBeginCapture": 2,
    "cudaStreamEndCapture": 1,
    "cudaGraphInstantiate": 2,
    "cudaGraphDestroy": 1,
    "cudaGraphLaunch": 2,
    "cudaGraphExecDestroy": 1,
    "cudaGetErrorString": 1,
    "cudaRuntimeGetVersion": 0,
    "cudaDriverGetVersion": 0,
}
"""Functions that are used, and how many arguments they get."""


@pytest.mark.parametrize(("name", "count"), CALLS.items())
def test_the_packages_functions_take_what_they_get(name: str, count: int) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    assert len(inspect.signature(getattr(runtime, name)).parameters) == count


def test_the_packages_constants_are_there() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for kind, expected in CONSTANTS.items():
        found = getattr(runtime, kind)
        if isinstance(expected, dict):
            assert {name: int(getattr(found, name)) for name in expected} == expected
        else:
            assert found == expected


def test_nothing_else_is_called() -> None:
    source = Path(cuda_python.__file__).read_text()
    assert set(re.findall(r"\"(cuda\w+)\"", source)) | {"cudaGetErrorString"} == CALLS.keys()


def test_a_machine_without_a_driver_is_one_clear_line() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"CUDA can't begin here: cudaGetDeviceCount: .*check nvidia-smi$"):
        CudaPython()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"pip install 'starkv\[trt\]'$"):
        CudaPython()


# --- beginning ---


def test_no_card(script: Script) -> None:
    script.answers["cudaGetDeviceCount"] = 0
    with pytest.raises(EngineError, match="finds no GPU"):
        CudaPython()


def test_a_driver_that_is_too_old_for_the_package(script: Script) -> None:
    script.failures["cudaGetDeviceCount"] = OLD_DRIVER
    with pytest.raises(EngineError) as caught:
        CudaPython()
    assert str(caught.value) == (
        "CUDA can't begin here: cudaGetDeviceCount: driver is insufficient; cuda-bindings is for CUDA 13.5, "
        "this driver runs CUDA 12.6 at most; update it, or pip install 'cuda-bindings==12.*'"
    )


@pytest.mark.parametrize(("driver", "reason"), [(0, "no NVIDIA driver"), (13060, "check nvidia-smi")])
def test_other_reasons(script: Script, driver: int, reason: str) -> None:
    script.failures["cudaGetDeviceCount"] = FAILED
    script.answers["cudaDriverGetVersion"] = driver
    with pytest.raises(EngineError, match=reason):
        CudaPython()


def test_a_missing_driver_as_versions_before_13_say_it(script: Script) -> None:
    for name in ("cudaGetDeviceCount", "cudaDriverGetVersion"):
        script.failures[name] = RuntimeError("Failed to dlopen libcuda.so.1")
    with pytest.raises(EngineError, match=r"Failed to dlopen libcuda.so.1; there is no NVIDIA driver"):
        CudaPython()


# --- memory ---


def test_memory_that_is_not_there(cuda: CudaPython, script: Script) -> None:
    script.failures["cudaMalloc"] = OUT_OF_MEMORY
    with pytest.raises(EngineError) as caught:
        cuda.allocate(5 << 20)
    assert str(caught.value) == (
        "the GPU is out of memory: 5 MiB asked for, 3 of 10 MiB free (cudaMalloc: out of memory)"
    )


def test_memory_of_no_bytes_has_an_address(cuda: CudaPython, script: Script) -> None:
    """TensorRT takes no null pointers."""
    assert cuda.allocate(0) == 4096
    assert script.last == ("cudaMalloc", 1)


def test_memory_goes_back(cuda: CudaPython, script: Script) -> None:
    cuda.free(4096)
    assert script.last == ("cudaFree", 4096)


def test_pinned_memory_lives_as_long_as_any_view_of_it(cuda: CudaPython, script: Script) -> None:
    array = cuda.allocate_pinned((3, 5), np.int32)
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((3, 5), np.int32, True)
    assert script.last == ("cudaMallocHost", 60)
    array[:] = 7
    assert (script.held[array.ctypes.data].view(np.int32) == 7).all()
    address, part = array.ctypes.data, array[1:].reshape(-1)[2:]
    del array
    assert "cudaFreeHost" not in script.names()
    del part
    assert script.last == ("cudaFreeHost", address)


def test_a_card_that_failed_is_left_alone(cuda: CudaPython, script: Script, capsys: Any) -> None:
    script.failures["cudaFreeHost"] = FAILED
    del (array := [cuda.allocate_pinned((2,), np.uint8)])[0]
    assert not array
    assert script.last[0] == "cudaFreeHost"
    assert capsys.readouterr().err == ""


def test_memory_of_a_card(cuda: CudaPython, script: Script, tmp_path: Path, monkeypatch: Any) -> None:
    known = tmp_path / "meminfo"
    known.write_text("MemTotal: 16384 kB\nMemAvailable:     5120 kB\n")
    monkeypatch.setattr(cuda_python, "_MEMORY", known)
    assert cuda.memory() == (FREE, TOTAL)
    script.answers["cudaDeviceGetAttribute"] = 1
    assert cuda.memory() == (5 << 20, TOTAL), "what caches of files would give back counts, too"
    assert script.last == ("cudaDeviceGetAttribute", 18, 0)
    known.unlink()
    assert cuda.memory() == (FREE, TOTAL)


# --- a stream ---


def test_a_stream_that_waits_for_no_other(cuda: CudaPython, script: Script) -> None:
    assert cuda.new_stream() == STREAM
    assert script.last == ("cudaStreamCreateWithFlags", 1)


def test_copies(cuda: CudaPython, script: Script) -> None:
    array = np.arange(6, dtype=np.float32)
    cuda.upload(4096, array, STREAM)
    assert script.last == ("cudaMemcpyAsync", 4096, array.ctypes.data, 24, 1, STREAM)
    cuda.download(array, 8192, STREAM)
    assert script.last == ("cudaMemcpyAsync", array.ctypes.data, 8192, 24, 2, STREAM)
    cuda.copy(1, 20, 2, 30, 10, 4, STREAM)
    assert script.last == ("cudaMemcpy2DAsync", 1, 20, 2, 30, 10, 4, 3, STREAM)
    cuda.clear(4096, 99, STREAM)
    assert script.last == ("cudaMemsetAsync", 4096, 0, 99, STREAM)
    cuda.synchronize(STREAM)
    assert script.last == ("cudaStreamSynchronize", STREAM)


@pytest.mark.parametrize(
    ("function", "act"),
    [
        ("cudaStreamSynchronize", lambda cuda: cuda.synchronize(STREAM)),
        ("cudaMemcpyAsync", lambda cuda: cuda.upload(1, np.zeros(1), STREAM)),
        ("cudaMemcpyAsync", lambda cuda: cuda.download(np.zeros(1), 1, STREAM)),
        ("cudaMemcpy2DAsync", lambda cuda: cuda.copy(1, 1, 1, 1, 1, 1, STREAM)),
        ("cudaMemsetAsync", lambda cuda: cuda.clear(1, 1, STREAM)),
        ("cudaFree", lambda cuda: cuda.free(1)),
        ("cudaStreamCreateWithFlags", lambda cuda: cuda.new_stream()),
        ("cudaStreamBeginCapture", lambda cuda: cuda.begin_capture(STREAM)),
        ("cudaGraphLaunch", lambda cuda: cuda.launch("executable", STREAM)),
        ("cudaGraphExecDestroy", lambda cuda: cuda.destroy_graph("executable")),
        ("cudaMemGetInfo", lambda cuda: cuda.memory()),
    ],
)
def test_every_failure_names_the_function(
    cuda: CudaPython, script: Script, function: str, act: Callable[[CudaPython], Any]
) -> None:
    script.failures[function] = FAILED
    with pytest.raises(EngineError, match=f"^{function}: launch failure$"):
        act(cuda)


# --- graphs ---


def test_a_graph(cuda: CudaPython, script: Script) -> None:
    cuda.begin_capture(STREAM)
    graph = cuda.end_capture(STREAM)
    cuda.launch(graph, STREAM)
    cuda.destroy_graph(graph)
    assert script.calls == [
        # Thread-local: what other threads allocate meanwhile does not spoil it.
        ("cudaStreamBeginCapture", STREAM, 1),
        ("cudaStreamEndCapture", STREAM),
        ("cudaGraphInstantiate", "graph", 0),
        ("cudaGraphDestroy", "graph"),
        ("cudaGraphLaunch", "executable", STREAM),
        ("cudaGraphExecDestroy", "executable"),
    ]


@pytest.mark.parametrize("function", ["cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_graph_that_fails_leaves_nothing(cuda: CudaPython, script: Script, function: str) -> None:
    script.failures[function] = FAILED
    cuda.begin_capture(STREAM)
    with pytest.raises(EngineError, match=function):
        cuda.end_capture(STREAM)
    recorded = function == "cudaGraphInstantiate"
    assert (("cudaGraphDestroy", "graph") in script.calls) == recorded
