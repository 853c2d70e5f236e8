# SPDX-License-Identifier: Apache-2.0
"""``starkv doctor``: what this machine can do, and what to do about what is missing."""

import ctypes
import json as json_module
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from starkv import __version__
from starkv.cli.console import results
from starkv.cli.doctor_plan import (
    Plan,
    PlanBudgets,
    PlanKvQuantization,
    PlanOptions,
    PlanPixels,
    PlanPrefillRows,
    PlanPromptRows,
    PlanQuantization,
    PlanSessions,
    show_plan,
)
from starkv.cli.doctor_tensorrt import plugins_row, tensorrt_row
from starkv.cli.engines import engines_home
from starkv.cli.options import Json
from starkv.host import cpu_model, usable_processors
from starkv.kernels.library_paths import KERNELS, PLUGINS, kernel_libraries, plugin_libraries

GIB = 2**30
_SMALL_DISK = 20 * GIB  # a 7B model: 5 GiB of engine, 16 GiB of checkpoint
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGES_OF_MALLOC = "glibc.malloc.hugetlb=1"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    usable: bool
    found: str
    advice: str = ""
    """What to do if it is wanted and not usable."""


def doctor(
    plan: Plan = None,
    kv_budget: PlanBudgets = None,
    sessions: PlanSessions = None,
    prompt_rows: PlanPromptRows = None,
    prefill_rows: PlanPrefillRows = None,
    quant: PlanQuantization = None,
    max_pixels: PlanPixels = None,
    kv_quant: PlanKvQuantization = None,
    json: Json = False,
) -> None:
    """Show what this machine can export, build and run, and how to get what is missing.

    Exits with code 1 where no engine can run at all.

    Example: [bold]starkv doctor --plan ui-tars-1.5-7b --kv-budget 0.2 --sessions 4[/] for the memory that a
    TensorRT engine takes
    """
    options = PlanOptions(kv_budget, sessions, prompt_rows, prefill_rows, quant, max_pixels, kv_quant)
    if plan is not None:
        show_plan(plan, options, json)
        return
    options.check_unused()
    findings = [check() for check in CHECKS]
    if json:
        print(json_module.dumps([asdict(finding) for finding in findings]))
    else:
        table = Table("", "", "found", "to do", box=None)
        for finding in findings:
            mark = "[green]ok[/]" if finding.usable else "[yellow]--[/]"
            # As plain text: the [cpu] of an advice is no style.
            table.add_row(finding.subject, mark, Text(finding.found), Text(finding.advice))
        results.print(table)
    if not any(finding.usable for finding in findings if finding.subject in ("ONNX Runtime", "TensorRT")):
        raise typer.Exit(1)


def installed(package: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding("starkv", True, f"{__version__} on Python {platform.python_version()}, {sys.platform}")


def _processor() -> Finding:
    try:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB of memory"
    except (AttributeError, ValueError, OSError):
        memory = ""
    return Finding("processor", True, f"{cpu_model()}, {usable_processors()} usable{memory}")


def _disk() -> Finding:
    home = engines_home().absolute()
    while not home.exists():
        home = home.parent
    free = shutil.disk_usage(home).free
    advice = (
        ""
        if free > _SMALL_DISK
        else "a 7B model needs about 20 GiB; free some, or set STARKV_ENGINES elsewhere"
    )
    return Finding("disk", free > _SMALL_DISK, f"{free / GIB:.0f} GiB free for engines in {home}", advice)


def _huge_pages() -> Finding:
    """Large models read gigabytes for each token, and finding out where a page lies takes time as well."""
    if not _HUGE_PAGES.is_file():
        return Finding("huge pages", False, "not known here")
    setting = _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    used = setting == "always" or (
        setting == "madvise" and _HUGE_PAGES_OF_MALLOC in os.environ.get("GLIBC_TUNABLES", "")
    )
    advice = ""
    if not used and setting == "madvise":
        advice = f"GLIBC_TUNABLES={_HUGE_PAGES_OF_MALLOC} may speed up decode of large models; try bench"
    return Finding("huge pages", used, f"transparent_hugepage is {setting}", advice)


def _onnx_runtime() -> Finding:
    cpu, gpu = installed("onnxruntime"), installed("onnxruntime-gpu")
    if cpu and gpu:
        advice = "they overwrite each other's files: pip uninstall both, then install one"
        return Finding("ONNX Runtime", False, f"onnxruntime {cpu} and onnxruntime-gpu {gpu}", advice)
    if not (cpu or gpu):
        return Finding("ONNX Runtime", False, "not installed", "pip install 'starkv[cpu]'")
    try:
        import onnxruntime
    except ImportError as error:
        return Finding(
            "ONNX Runtime", False, f"import fails: {error}", "pip install --force-reinstall onnxruntime"
        )
    providers = ", ".join(
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    )
    return Finding("ONNX Runtime", True, f"{cpu or gpu}, providers {providers}")


def _export() -> Finding:
    missing = [name for name in ("onnx", "onnx-ir") if not installed(name)]
    if missing:
        return Finding(
            "export, build", False, f"{', '.join(missing)} not installed", "pip install 'starkv[export]'"
        )
    return Finding("export, build", True, f"onnx {installed('onnx')}, onnx-ir {installed('onnx-ir')}")


def _trace() -> Finding:
    torch, transformers = installed("torch"), installed("transformers")
    if torch and transformers:
        return Finding("PyTorch", True, f"torch {torch}, transformers {transformers}")
    return Finding(
        "PyTorch",
        False,
        "not installed",
        "needed only to train, for validate and for --route trace: 'starkv[trace]'",
    )


def _cuda() -> Finding:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding("CUDA", False, "no NVIDIA driver", "needed only for GPUs: install the NVIDIA driver")
    count, api = ctypes.c_int(), ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return Finding("CUDA", False, f"driver without a usable GPU (CUDA error {code})", "check nvidia-smi")
    driver.cuDriverGetVersion(ctypes.byref(api))
    name = ctypes.create_string_buffer(100)
    driver.cuDeviceGetName(name, len(name), 0)
    api_version = f"{api.value // 1000}.{api.value % 1000 // 10}"
    return Finding("CUDA", True, f"{count.value} x {name.value.decode()}, driver for CUDA {api_version}")


def _gpu_engines() -> Finding:
    from starkv.gpu import find_gpu
    from starkv.runtime.engines.ort_cuda_gpu import CUDA_PROVIDER

    subject, gpu = "engines on GPU", find_gpu()
    if gpu is None:
        return Finding(subject, False, "no NVIDIA GPU", "engines run on the processor")
    major, minor = gpu.capability
    found = f"{gpu.name}, compute capability {major}.{minor}, {gpu.memory / GIB:.0f} GiB"
    advice = "pip uninstall onnxruntime, then pip install 'starkv[cuda]'"
    try:
        import onnxruntime
    except ImportError:
        return Finding(subject, False, found, advice)
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return Finding(subject, False, found, advice)
    dtype = "" if gpu.capability >= (8, 0) else " --compute-dtype float16"
    return Finding(subject, True, found, f"build one: starkv build MODEL --device cuda{dtype}")


def _tensorrt() -> Finding:
    return Finding("TensorRT", *tensorrt_row())


def _plugins() -> Finding:
    return Finding("TensorRT plugins", *plugins_row())


def _kernels() -> Finding:
    found = [path.name for device in KERNELS for path in islice(kernel_libraries(device), 1)]
    found += [both[0].name for device in PLUGINS if (both := plugin_libraries(device))]
    usable = KERNELS["cuda"] in found
    if found:
        advice = "" if usable else "those for tests only: `make plugin` with nvcc builds the GPU's"
        return Finding("kernels", usable, ", ".join(found), advice)
    return Finding("kernels", False, "not built", "needed only for GPUs: `make plugin`")


def _nvcc() -> Finding:
    path = shutil.which("nvcc")
    if not path:
        return Finding(
            "nvcc", False, "not on PATH", "needed only to compile CUDA kernels: install the CUDA toolkit"
        )
    try:
        printed = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("nvcc", False, f"{path} fails: {error}", "reinstall the CUDA toolkit")
    release = next(
        (line.split("release ")[1] for line in printed.splitlines() if "release " in line), printed.strip()
    )
    return Finding("nvcc", True, release)


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _processor,
    _disk,
    _huge_pages,
    _onnx_runtime,
    _export,
    _trace,
    _cuda,
    _gpu_engines,
    _tensorrt,
    _plugins,
    _kernels,
    _nvcc,
)
