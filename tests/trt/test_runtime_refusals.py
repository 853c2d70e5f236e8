# SPDX-License-Identifier: Apache-2.0
"""TensorRT engines that can't run here say why in one line, and leave nothing on the card."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import Command
from fake_cuda import FakeCuda
from fake_tensorrt import H100, ORIN
from runtime_cases import Engines, open_on
from trt_engines import SCREEN_FILE, Exports

from starkv.errors import EngineError, StarkvError
from starkv.gpu import Gpu
from starkv.manifest import MANIFEST_NAME, read_manifest, seal, sha256_of
from starkv.runtime.engines import trt_opening
from starkv.runtime.engines.opening import open_engine
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.engines.trt_memory import WEIGHTS_VARIABLE

SERVER = "10.13.3.9"
NEIGHBOUR = replace(H100, name="NVIDIA H200")
ADA = Gpu("NVIDIA L4", (8, 9), 24 << 30, (13, 0))


@pytest.fixture
def copy(engines: Engines, tmp_path: Path) -> Path:
    """An engine that a test may spoil."""
    return shutil.copytree(engines.directory(), tmp_path / "engine")


def refused(directory: Path, cuda: FakeCuda | None = None, verify: bool = False, **arguments: Any) -> str:
    """Why an engine is not opened; the card is as it was."""
    cuda = cuda or FakeCuda()
    with pytest.raises(StarkvError) as caught:
        TrtEngine(directory, verify, 1, cuda, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    caught.value.__traceback__ = None
    assert cuda.leaks() == []
    return message


def replace_plugins(directory: Path, content: bytes) -> None:
    """Be an engine that was built with another library."""
    library = directory / "libstarkv_trt.so"
    library.write_bytes(content)
    manifest = read_manifest(directory)
    files = manifest.files | {library.name: sha256_of(library)}
    (directory / MANIFEST_NAME).write_text(seal(manifest.model_copy(update={"files": files})))


# --- the machine ---


def test_no_driver(engines: Engines) -> None:
    """A Runtime without a card crashes the process: the fake would fail the test."""
    directory = engines.directory()
    engines.install(gpu=None)
    assert "no NVIDIA GPU here" in refused(directory)


def test_no_tensorrt(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = engines.directory()
    engines.install()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    message = refused(directory)
    assert "TensorRT is not installed" in message
    assert "pip install 'starkv[trt]'" in message


@pytest.mark.parametrize(
    ("version", "age"), [("8.6.1", "too old"), ("10.2.0.19", "too old"), ("12.0.0.1", "too new")]
)
def test_tensorrt_of_another_age(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, version: str, age: str
) -> None:
    directory = engines.directory()
    engines.install()
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", version)
    assert f"TensorRT {version} is {age}: starkv needs 10.3 to 11.x" in refused(directory)


def test_another_tensorrt_than_it_was_built_with(engines: Engines) -> None:
    """A plan runs on the version that built it, up to the fourth number."""
    directory = engines.directory()
    engines.install("10.3.0.30")
    message = refused(directory)
    assert "built with TensorRT 10.3.0.26, here is 10.3.0.30" in message
    assert "starkv build" in message


@pytest.mark.parametrize("gpu", [ORIN, NEIGHBOUR, ADA])
def test_another_gpu(engines: Engines, gpu: Gpu) -> None:
    directory = engines.directory()
    engines.install(gpu=gpu)
    message = refused(directory)
    assert "built for NVIDIA H100 (compute capability 9.0, hardware compatibility none)" in message
    assert f"here is {gpu.name} ({gpu.capability[0]}.{gpu.capability[1]})" in message


@pytest.mark.parametrize(
    ("level", "gpu", "runs"),
    [
        ("same_compute_capability", NEIGHBOUR, True),
        ("same_compute_capability", ADA, False),
        ("ampere_plus", ADA, True),
        ("ampere_plus", Gpu("T4", (7, 5), 16 << 30, (13, 0)), False),
    ],
)
def test_gpus_that_it_was_built_for(engines: Engines, level: str, gpu: Gpu, runs: bool) -> None:
    directory = engines.directory(version=SERVER, hardware_compatibility=level)
    state = engines.install(SERVER, gpu=gpu)
    if runs:
        assert open_on(state, directory).info.device == gpu.name
    else:
        assert f"hardware compatibility {level}" in refused(directory)


def test_an_older_driver(engines: Engines) -> None:
    directory = engines.directory()
    engines.install(gpu=replace(H100, driver_cuda=(12, 6)))
    message = refused(directory)
    assert "built with CUDA 13.0, but this driver runs CUDA 12.6 at most" in message


def test_no_cuda_python(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = engines.directory()
    engines.install()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"package cuda-bindings; pip install 'starkv\[trt\]'"):
        TrtEngine(directory, verify=False)


def test_a_processor_was_asked_for(engines: Engines) -> None:
    with pytest.raises(EngineError, match="built for TensorRT, for GPUs only"):
        open_engine(engines.directory(), device="cpu")


# --- the directory ---


def test_engines_of_other_runtimes(engines: Engines, exports: Exports) -> None:
    engines.install()
    assert "was built for ONNX Runtime, not for TensorRT" in refused(exports.processor_engine)
    with pytest.raises(EngineError, match="was built for TensorRT, not for ONNX Runtime"):
        OrtEngine(engines.directory())


def test_a_manifest_that_says_nothing_of_tensorrt(engines: Engines, copy: Path) -> None:
    manifest = read_manifest(copy).model_copy(update={"tensorrt": None})
    (copy / MANIFEST_NAME).write_text(seal(manifest))
    engines.install()
    assert "tensorrt is missing" in refused(copy)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "can't open"),
    "no plan": (lambda path: path.write_bytes(b"PK" * 5000), "can't open"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "missing": (lambda path: path.unlink(), "can't be read"),
}


@pytest.mark.parametrize("version", ["10.3.0.26", SERVER])
@pytest.mark.parametrize("name", ["vision", "decoder", "compress"])
@pytest.mark.parametrize(("spoil", "reason"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_plan(
    engines: Engines, tmp_path: Path, version: str, name: str, spoil: Callable[[Path], object], reason: str
) -> None:
    directory = shutil.copytree(engines.directory(version=version), tmp_path / "engine")
    spoil(directory / f"{name}.plan")
    engines.install(version)
    message = refused(directory)
    assert f"{name}.plan" in message
    assert reason in message
    assert "again" in message
    assert f"{name}.plan" in refused(directory, verify=True), "and its hash gives it away before"


def test_plans_of_something_else(engines: Engines, copy: Path) -> None:
    shutil.copyfile(copy / "compress.plan", copy / "vision.plan")
    engines.install()
    assert "vision.plan: input pixel_values is missing, expected float32" in refused(copy)


def test_a_plan_of_another_dtype(engines: Engines, copy: Path) -> None:
    other = engines.directory(compute_dtype="float16")
    shutil.copyfile(other / "decoder.plan", copy / "decoder.plan")
    engines.install()
    assert "is float16, expected bfloat16" in refused(copy)


def test_no_plugins(engines: Engines, copy: Path) -> None:
    (copy / "libstarkv_trt.so").unlink()
    engines.install()
    assert "libstarkv_trt.so is missing" in refused(copy)


def test_something_that_is_no_plugin_library(engines: Engines, copy: Path) -> None:
    """TensorRT puts out None and says nothing."""
    replace_plugins(copy, b"#!/bin/sh\n")
    engines.install()
    assert "it is no plugin library" in refused(copy)


def test_half_of_a_library_is_never_loaded(engines: Engines, copy: Path) -> None:
    """It would crash the process, so its hash is looked at even where nobody asked for that."""
    cut(copy / "libstarkv_trt.so")
    engines.install()
    assert "libstarkv_trt.so was changed or damaged" in refused(copy, verify=False)


def test_plugins_of_a_newer_cuda(engines: Engines, copy: Path) -> None:
    content = (copy / "libstarkv_trt.so").read_bytes()
    replace_plugins(copy, content + b"\0Cuda compilation tools, release 14.1, V14.1.0\0")
    engines.install()
    message = refused(copy)
    assert "was built with CUDA 14.1" in message
    assert "13.0" in message


def test_plugins_are_loaded_once(engines: Engines) -> None:
    """A second load puts out None."""
    state = engines.install()
    directory = engines.directory()
    for _ in range(2):
        assert open_on(state, directory).info.backend == "trt"


def test_a_kernel_library_for_something_else_leaves_picking_to_the_host(engines: Engines, copy: Path) -> None:
    state = engines.install()
    (copy / "libstarkv_kernels.so").write_text("kernels")
    assert trt_opening.kernels_beside(copy) is None
    assert not open_on(state, copy, kernels=None).picks_on_device


def test_a_share_of_weights_that_is_no_number(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = engines.directory()
    engines.install()
    monkeypatch.setenv(WEIGHTS_VARIABLE, "2 GiB")
    assert f"{WEIGHTS_VARIABLE} is '2 GiB'" in refused(directory)


# --- the command ---


def test_the_command_says_it_in_one_line(engines: Engines, starkv: Command) -> None:
    directory = engines.directory()
    engines.install(gpu=None)
    result = starkv("run", "--engine", str(directory), "--image", str(SCREEN_FILE), "--prompt", "Click.")
    assert result.code == 2
    assert "no NVIDIA GPU here" in result.err
    assert len(result.err.strip().splitlines()) == 1
