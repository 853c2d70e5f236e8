# SPDX-License-Identifier: Apache-2.0
"""Parts of a TensorRT build that need no TensorRT: progress, Ctrl-C, the plugins' file, measured kernels."""

import signal
import threading
import time
from pathlib import Path

import pytest

from starkv.errors import EngineError, UsageError
from starkv.export.build.trt_machine import find_build_machine, planned_target, reason_not_to_build
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.gpu import Gpu
from starkv.trt_compat.build_monitor import BuildMonitor, run_stoppable
from starkv.trt_compat.plugin_file import check_plugins, cuda_release, find_plugins
from starkv.trt_compat.timing_cache import default_directory, timing_cache_path
from starkv.trt_compat.version import OLDEST, TensorRTVersion

ORIN = Gpu("Orin (nvgpu)", (8, 7), 32 << 30, (12, 6))


def test_percent_of_nested_phases_only_grows() -> None:
    said: list[str] = []
    seen = []
    monitor = BuildMonitor(said.append)
    monitor.phase_start("Building engine", None, 2)
    for half in range(2):
        monitor.phase_start("Timing", "Building engine", 4)
        for _ in range(4):
            assert monitor.step_complete("Timing")
            seen.append(len(said))
        monitor.phase_finish("Timing")
        assert monitor.step_complete("Building engine")
        assert len(said) == (50, 99)[half]
    monitor.phase_finish("Building engine")
    assert seen[:3] == [12, 25, 37]
    assert seen == sorted(seen)
    monitor.finish("decoder.plan")
    assert len(said) == 100
    assert said[-1] == "decoder.plan"


def test_phases_may_end_early_or_never_begin() -> None:
    said: list[str] = []
    monitor = BuildMonitor(said.append)
    assert monitor.step_complete("never began")
    monitor.phase_finish("never began")
    monitor.phase_start("outer", None, 10)
    monitor.phase_finish("outer")
    monitor.finish("plan")
    assert len(said) == 100


def test_a_stopped_build_is_told_so_at_its_next_step() -> None:
    monitor = BuildMonitor(lambda _: None)
    monitor.phase_start("outer", None, 3)
    assert monitor.step_complete("outer")
    monitor.stop()
    assert not monitor.step_complete("outer")


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_waits_until_the_work_has_stopped() -> None:
    stopped, ended = threading.Event(), threading.Event()

    def work() -> str:
        # The main thread hears the signal while it waits.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert stopped.wait(5)
        time.sleep(0.1)
        ended.set()
        return "done"

    with pytest.raises(KeyboardInterrupt):
        run_stoppable(work, stopped.set)
    assert ended.is_set()


def test_results_and_errors_of_the_work_come_back() -> None:
    def fail() -> None:
        raise OSError("disk full")

    assert run_stoppable(lambda: 3, lambda: None) == 3
    with pytest.raises(OSError, match="disk full"):
        run_stoppable(fail, lambda: None)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libstarkv_trt.so"
    path.write_bytes(b"\x7fELF" + bytes(5000) + b"\0Cuda compilation tools, release 13.0, V13.0.88\0")
    return path


def test_cuda_of_a_library_is_read_from_its_kernels(library: Path, tmp_path: Path) -> None:
    assert cuda_release(library) == (13, 0)
    for content in (b"", b"\x7fELF without kernels"):
        (tmp_path / "other.so").write_bytes(content)
        assert cuda_release(tmp_path / "other.so") is None


def test_plugins_of_a_newer_cuda_are_refused(library: Path) -> None:
    with pytest.raises(EngineError, match=r"was built with CUDA 13\.0, but the driver here runs up to 12\.6"):
        check_plugins(library, ORIN)
    check_plugins(library, Gpu("H100", (9, 0), 80 << 30, (13, 1)))
    # A driver that doesn't say is no reason to refuse.
    check_plugins(library, Gpu("H100", (9, 0), 80 << 30))


def test_plugins_are_found_where_they_are_built(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_plugins(library) == library
    with pytest.raises(EngineError, match=r"nowhere\.so is missing; `make plugin`"):
        find_plugins(tmp_path / "nowhere.so")
    monkeypatch.setenv("STARKV_KERNELS", str(tmp_path / "libstarkv_kernels.so"))
    assert find_plugins(None) == library


def test_measured_kernels_are_those_of_one_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = Path("folder")
    path = timing_cache_path(folder, "10.3.0.26", ORIN)
    assert path == folder / "10.3.0.26-sm87-cuda12.6-orin-nvgpu.timing"
    others = [
        timing_cache_path(folder, "10.3.0.30", ORIN),
        timing_cache_path(folder, "10.3.0.26", Gpu("Orin (nvgpu)", (8, 7), 0, (12, 8))),
        timing_cache_path(folder, "10.3.0.26", Gpu("A40", (8, 6), 0, (12, 6))),
    ]
    assert len({path, *others}) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "starkv" / "tensorrt"
    monkeypatch.setenv("STARKV_TIMING_CACHE", "elsewhere")
    assert default_directory() == Path("elsewhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compute_dtype": "float32"}, "computes in bfloat16 or float16"),
        ({"sessions": 0}, "--sessions is 0"),
        ({"prefill_rows": -1}, "--prefill-rows is -1"),
        ({"workspace": 0}, "--workspace is 0"),
        ({"optimization_level": 6}, "--optimization-level is 6"),
    ],
)
def test_impossible_options(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TrtBuildOptions(**change)  # type: ignore[arg-type]


def test_without_a_gpu_tensorrt_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starkv.gpu.find_gpu", lambda: None)
    monkeypatch.setattr("starkv.export.build.trt_machine.load_tensorrt", lambda: pytest.fail("was asked"))
    with pytest.raises(EngineError, match="no NVIDIA GPU here"):
        find_build_machine(TrtBuildOptions())
    assert "no NVIDIA GPU" in str(reason_not_to_build(TrtBuildOptions()))


def test_plans_are_for_the_target_or_the_oldest() -> None:
    assert planned_target(TrtBuildOptions(target=TensorRTVersion(11, 1))) == TensorRTVersion(11, 1)
    assert planned_target(TrtBuildOptions()) == OLDEST
    with pytest.raises(EngineError, match=r"TensorRT 10\.3 builds no plans for all GPUs of one compute"):
        planned_target(TrtBuildOptions(hardware_compatibility="same_compute_capability"))
