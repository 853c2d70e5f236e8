# SPDX-License-Identifier: Apache-2.0
"""``starkv build --backend trt`` where something goes wrong: one line, and nothing left."""

import errno
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from command import Command
from conftest import TinyModel
from scripted_builder import Script, builder_machine, install

from starkv.export.build.trt import build_trt_engine
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.gpu import Gpu
from starkv.manifest import read_manifest, sha256_of


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    return builder_machine(monkeypatch, tmp_path)


def refused(starkv: Command, *arguments: object) -> str:
    """The one line; there was no engine before and is none after."""
    done = starkv("build", *arguments)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert not list(Path().rglob("*"))
    return lines[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "10.2.0.19"}, "TensorRT 10.2.0.19 is too old: starkv needs 10.3 to 11.x"),
        ({"version": "12.0.0"}, "TensorRT 12.0.0 is too new"),
        ({"builder": False}, "finds no usable GPU (CUDA initialization failure with error: 35)"),
        ({"plugins": False}, "can't load"),
        (
            {"parser_errors": [("layers.0/x", "MatMul", "wrong type"), ("", "", "and more")]},
            "can't read vision.onnx: node layers.0/x (MatMul): wrong type; and more",
        ),
        ({"profile_index": -1}, "refuses the input sizes of vision.onnx"),
        ({"build_error": "no kernel\nfor it"}, "can't build vision.plan: no kernel for it"),
        ({"build_error": "Cuda failure: out of memory"}, "give less with --workspace, --prefill-rows"),
        (
            {"loads": False},
            "vision.plan was built, but can't be loaded; the GPU's memory may be too small for it",
        ),
    ],
)
def test_failures_of_tensorrt_are_one_line(
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    starkv: Command,
    tiny: TinyModel,
    change: dict[str, Any],
    words: str,
) -> None:
    for name, value in change.items():
        setattr(script, name, value)
    install(monkeypatch, script)
    assert words in refused(starkv, tiny.exports["int4"], "--backend", "trt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target-version", "11.1"), "build for 11.1 where that is installed, or add --dry-run"),
        (("--plugin", "nowhere.so"), "nowhere.so is missing; `make plugin` builds"),
        (("--hardware-compatibility", "same_compute_capability"), "TensorRT 10.3 builds no plans for all"),
        (("--max-context", "4096"), "was exported for 512"),
        (("--compute-dtype", "float32"), "computes in bfloat16 or float16, not in float32"),
    ],
)
def test_options_that_do_not_go_here(
    script: Script, starkv: Command, tiny: TinyModel, arguments: tuple[str, ...], words: str
) -> None:
    assert words in refused(starkv, tiny.exports["int4"], "--backend", "trt", *arguments)


def test_strip_is_named_where_tensorrt_refuses_two_profiles(
    script: Script, starkv: Command, tiny: TinyModel
) -> None:
    script.profile_index = -1
    said = refused(starkv, tiny.exports["int4"], "--strip-weights")
    assert "build without --strip-weights" in said


def test_plugins_of_another_cuda_are_refused(
    script: Script, monkeypatch: pytest.MonkeyPatch, starkv: Command, tiny: TinyModel
) -> None:
    monkeypatch.setattr("starkv.gpu.find_gpu", lambda index=0: Gpu("Orin", (8, 7), 8 << 30, (12, 6)))
    assert "was built with CUDA 13.0" in refused(starkv, tiny.exports["int4"], "--backend", "trt")


def test_an_old_gpu_computes_in_float16(
    script: Script, monkeypatch: pytest.MonkeyPatch, starkv: Command, tiny: TinyModel
) -> None:
    monkeypatch.setattr("starkv.gpu.find_gpu", lambda index=0: Gpu("T4", (7, 5), 16 << 30, (13, 0)))
    said = refused(starkv, tiny.exports["int4"], "--backend", "trt", "--compute-dtype", "bfloat16")
    assert "T4 has no bfloat16; use --compute-dtype float16" in said
    said = refused(starkv, tiny.exports["int4"], "--hardware-compatibility", "ampere_plus")
    assert "this one has compute capability 7.5" in said
    done = starkv("build", tiny.exports["int4"], "--backend", "trt")
    assert read_manifest(Path(done.out.strip())).compute_dtype == "float16"


def test_foreign_directories_are_never_replaced(script: Script, starkv: Command, tiny: TinyModel) -> None:
    Path("photos").mkdir()
    Path("photos/cat.jpg").write_text("cat")
    done = starkv("build", tiny.exports["fp32"], "--backend", "trt", "--out", "photos")
    assert done.code == 2
    assert "no manifest.json, so it is not overwritten" in done.err
    assert [path.name for path in Path("photos").iterdir()] == ["cat.jpg"]
    assert not script.words("parse")


def test_too_small_a_disk_is_seen_first(
    script: Script, monkeypatch: pytest.MonkeyPatch, starkv: Command, tiny: TinyModel
) -> None:
    monkeypatch.setattr("starkv.export.build.files.free_space", lambda out: (out, 1000))
    assert "no room for the engine" in refused(starkv, tiny.exports["fp32"], "--backend", "trt")
    assert not script.words("parse")


@pytest.mark.parametrize("version", ["10.3.0.26", "11.1.0.106"])
def test_full_disk_is_one_line(
    script: Script, monkeypatch: pytest.MonkeyPatch, starkv: Command, tiny: TinyModel, version: str
) -> None:
    script.version = version
    install(monkeypatch, script)

    class FullDisk:
        def __enter__(self) -> "FullDisk":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    real = Path.open

    def opened(path: Path, *arguments: Any, **more: Any) -> Any:
        writes = path.suffix == ".plan" and arguments == ("wb",)
        return FullDisk() if writes else real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", opened)
    assert "no room for the engine" in refused(starkv, tiny.exports["fp32"], "--backend", "trt")


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_stops_tensorrt_and_leaves_nothing_but_what_was_there(
    script: Script, tiny: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "engines" / "tiny"
    build_trt_engine(tiny.exports["int4"], out, TrtBuildOptions())
    before = {path.name: sha256_of(path) for path in out.iterdir()}
    interrupted = threading.Event()

    def press() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        interrupted.wait(0.2)

    script.during_build = press
    with pytest.raises(KeyboardInterrupt):
        build_trt_engine(tiny.exports["fp32"], out, TrtBuildOptions())
    assert script.words("stopped") == [()]
    assert {path.name: sha256_of(path) for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
