# SPDX-License-Identifier: Apache-2.0
"""Which device an engine is built for, which one it runs on, and what is said where they don't fit."""

from pathlib import Path

import pytest
from command import Command
from conftest import ChatModel, TinyModel

from starkv import gpu as gpu_module
from starkv.cli import doctor as doctor_module
from starkv.cli.engines import engine_directory, find_engine, settle_dtype
from starkv.errors import EngineError, UsageError
from starkv.gpu import Gpu
from starkv.manifest import MANIFEST_NAME, read_manifest
from starkv.runtime.engines import opening, ort_cuda_gpu
from starkv.runtime.engines.opening import open_engine
from starkv.runtime.engines.ort import OrtEngine

GPU = Gpu("NVIDIA Test 1", (8, 9), 24 << 30)


@pytest.mark.parametrize(
    ("device", "asked", "dtype"),
    [
        ("cpu", None, "float32"),
        ("cpu", "float32", "float32"),
        ("cuda", None, "bfloat16"),
        ("cuda", "float16", "float16"),
    ],
)
def test_a_device_has_its_dtypes(device: str, asked: str | None, dtype: str) -> None:
    assert settle_dtype(device, asked) == dtype


@pytest.mark.parametrize(
    ("device", "asked", "message"),
    [
        ("cpu", "bfloat16", "an engine for cpu computes in float32, not in bfloat16"),
        ("cuda", "float32", "an engine for cuda computes in bfloat16 or float16, not in float32"),
        ("tpu", None, "unknown device 'tpu'; an engine is built for cpu or cuda"),
    ],
)
def test_others_are_refused(device: str, asked: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settle_dtype(device, asked)


@pytest.fixture
def built(starkv: Command, tiny: TinyModel) -> dict[str, Path]:
    """Engines for both devices, built by the command."""
    places = {}
    for device in ("cpu", "cuda"):
        done = starkv("build", str(tiny.exports["int4"]), "--device", device)
        assert done.code == 0, done.err
        places[device] = Path(done.out.strip())
    return places


def test_engines_of_both_devices_lie_side_by_side(built: dict[str, Path], starkv: Command) -> None:
    assert built == {device: engine_directory("tiny", "ort", "int4", device) for device in ("cpu", "cuda")}
    dtypes = {device: read_manifest(place).compute_dtype for device, place in built.items()}
    assert dtypes == {"cpu": "float32", "cuda": "bfloat16"}
    shown = starkv("inspect", str(built["cuda"])).out
    assert "bfloat16, for GPUs" in shown
    # 2 layers, keys and values of 2 heads of 64 numbers, 2 bytes each.
    assert "1,024 bytes per token (bfloat16)" in shown
    assert "2,048 bytes per token (float32)" in starkv("inspect", str(built["cpu"])).out


def test_auto_takes_what_the_engine_was_built_for(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_engine(built["cpu"]), OrtEngine)
    asked = []
    monkeypatch.setattr(opening, "OrtDeviceEngine", lambda *arguments: asked.append(arguments))
    open_engine(built["cuda"], verify=False, threads=3)
    assert asked == [(built["cuda"], False, 3)]
    with pytest.raises(EngineError, match="computes in bfloat16, for a GPU"):
        open_engine(built["cuda"], device="cpu")
    with pytest.raises(UsageError, match="unknown device 'tpu'; known: auto, cpu, cuda"):
        open_engine(built["cpu"], device="tpu")


@pytest.mark.parametrize(
    ("present", "gpu", "device", "expected"),
    [
        (("cpu", "cuda"), GPU, "auto", "cuda"),
        (("cpu", "cuda"), None, "auto", "cpu"),
        (("cpu",), GPU, "auto", "cpu"),
        (("cpu", "cuda"), GPU, "cpu", "cpu"),
        (("cpu", "cuda"), None, "cuda", "cuda"),
        ((), GPU, "auto", "cuda"),
        ((), None, "auto", "cpu"),
        (("cpu",), None, "cuda", "cuda"),
    ],
)
def test_a_models_engine_is_the_devices(
    starkv: Command,
    monkeypatch: pytest.MonkeyPatch,
    present: tuple[str, ...],
    gpu: Gpu | None,
    device: str,
    expected: str,
) -> None:
    """Built where there is none yet."""
    monkeypatch.setattr(ort_cuda_gpu, "ready_gpu", lambda: gpu)
    made = []

    def build(*_: object, compute_dtype: str, **__: object) -> tuple[Path, None]:
        made.append(compute_dtype)
        return engine_directory(
            "gui-tiny", "ort", "int8", "cpu" if compute_dtype == "float32" else "cuda"
        ), None

    monkeypatch.setattr("starkv.cli.engines.build_engine", build)
    for each in present:
        place = engine_directory("gui-tiny", "ort", "int8", each)
        place.mkdir(parents=True)
        (place / MANIFEST_NAME).write_text("{}")
    assert find_engine("gui-tiny", device=device) == engine_directory("gui-tiny", "ort", "int8", expected)
    assert made == ([] if expected in present else [settle_dtype(expected, None)])


def test_run_on_a_gpu_that_is_not_there_is_one_clear_line(
    starkv: Command, babbling: ChatModel, screenshot: Path
) -> None:
    done = starkv(
        *("run", "--engine", str(babbling.engine), "--image", str(screenshot), "--prompt", "Click."),
        *("--device", "cuda"),
    )
    assert done.code == 2
    assert "computes in float32, for processors; build one for a GPU with" in done.err


def test_doctor_tells_what_a_gpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "find_gpu", lambda: None)
    assert not doctor_module._gpu_engines().usable
    monkeypatch.setattr(gpu_module, "find_gpu", lambda: GPU)
    found = doctor_module._gpu_engines()
    assert found.found == "NVIDIA Test 1, compute capability 8.9, 24 GiB"
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert doctor_module._gpu_engines().advice.endswith("pip install 'starkv[cuda]'")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert doctor_module._gpu_engines().advice == "build one: starkv build MODEL --device cuda"
    old = Gpu("NVIDIA Old", (7, 5), 8 << 30)
    monkeypatch.setattr(gpu_module, "find_gpu", lambda: old)
    assert doctor_module._gpu_engines().advice.endswith("--compute-dtype float16")
