# SPDX-License-Identifier: Apache-2.0
"""Steps of ``make trt-check`` that need a GPU, and those that need TensorRT on top."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

from gpu_steps import ROOT, Result, SkippedError, run_command
from trt_check_fetch import header_folders
from trt_check_host import tool
from trt_check_tests import run_tests

from starkv.errors import EngineError
from starkv.gpu import Gpu, find_gpu
from starkv.kernels.library_paths import LIBRARY_VARIABLE, PLUGINS
from starkv.trt_compat.module import TensorRT, load_tensorrt

_BUILD = ROOT / "build" / "trt-check-gpu"
_ENGINES = ROOT / "build" / "trt-check-engines"
_STARKV = [sys.executable, "-m", "starkv.cli"]
_MAJOR = re.compile(r"#define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)")
ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bfloat16": ("fp32", ("--compute-dtype", "bfloat16")),
    "float16": ("fp32", ("--compute-dtype", "float16")),
    "int4": ("int4", ()),
    "stripped": ("fp32", ("--strip-weights",)),
    "layers": ("fp32", ("--debug-layers", "*/Add_*.0")),
}
"""Builds of gui-tiny: how its weights are stored, and other options."""


def gpu() -> Gpu:
    """The card.

    Raises:
        SkippedError: there is none.
    """
    found = find_gpu()
    if found is None:
        raise SkippedError("no NVIDIA GPU here")
    return found


def plugins_for_gpu() -> Result:
    """Build the plugins for this card, unless ``STARKV_KERNELS`` names a build, and enqueue each on it."""
    card = gpu()
    if not os.environ.get(LIBRARY_VARIABLE):
        if not shutil.which("nvcc"):
            raise SkippedError(f"no nvcc on PATH, and {LIBRARY_VARIABLE} names no library")
        folders = header_folders()
        options = [f"-DSTARKV_CUDA_ARCHS={card.capability[0]}{card.capability[1]}"]
        options += [f"-DTENSORRT_INCLUDE_DIR={_headers_for(folders)}"] if folders else []
        run_command([tool("cmake"), "-S", "plugins_trt", "-B", str(_BUILD), *options])
        run_command([tool("cmake"), "--build", str(_BUILD), "--parallel"])
        os.environ[LIBRARY_VARIABLE] = str(_BUILD / "libstarkv_kernels.so")
    driver = _library().with_name("gpu_driver")
    if not driver.is_file():
        raise SkippedError(f"{driver} was not built")
    output = run_command([str(driver), str(_library())])
    return output.strip().splitlines()[-1], "", {}


def sequence_on_gpu() -> Result:
    """gui-tiny's tokens from the strict fakes with the real plugins' enqueue on the GPU."""
    gpu()
    settings = {"STARKV_TRT_PLUGINS": "cuda"}
    return run_tests(["tests/trt/test_end_to_end_plugins.py"], "", settings).result()


def build(name: str) -> Result:
    """Really build an engine of gui-tiny."""
    tensorrt, _ = _ready()
    folder = _ENGINES / name
    shutil.rmtree(folder, ignore_errors=True)
    quant, others = ENGINES[name]
    options = ["--backend", "trt", "--quant", quant, "--plugin", str(_library()), *others]
    run_command([*_STARKV, "build", "gui-tiny", *options, "--out", str(folder)])
    sizes = {plan.name: plan.stat().st_size for plan in sorted(folder.glob("*.plan"))}
    total = sum(sizes.values()) / 2**20
    return f"TensorRT {tensorrt.full_version}, plans of {total:,.1f} MiB", "", {"plans": sizes}


def validate(name: str) -> Result:
    """``starkv validate engine``: outputs against ONNX Runtime's, layer by layer where that was built."""
    engine, quant = _built(name), ENGINES[name][0]
    reference, report = _ENGINES / f"onnx-runtime-{quant}", _ENGINES / f"{name}.json"
    shutil.rmtree(reference, ignore_errors=True)
    options = ["--backend", "ort", "--quant", quant, "--out", str(reference)]
    run_command([*_STARKV, "build", "gui-tiny", *options])
    options = ["--reference", str(reference), "--out", str(report)]
    options += ["--layers"] if name == "layers" else []
    run_command([*_STARKV, "validate", "engine", str(engine), *options])
    figures = json.loads(report.read_text())
    return f"{figures['counts']['passed']} outputs agree", "", figures


def bench(name: str) -> Result:
    """``starkv bench``."""
    output = run_command([*_STARKV, "bench", "--engine", str(_built(name)), "-d", "0", "-d", "2048"])
    table = "\n".join(line for line in output.splitlines() if line.startswith("|"))
    return "see its table", table, {}


def _ready() -> tuple[TensorRT, Gpu]:
    card = gpu()
    try:
        return load_tensorrt(), card
    except EngineError as error:
        raise SkippedError(str(error)) from None


def _headers_for(folders: list[Path]) -> Path:
    """Headers of the major version that is installed, whose logger the plugins then use; else the newest."""
    try:
        major = load_tensorrt().version.major
    except EngineError:
        return folders[-1]
    found = {folder: _MAJOR.search((folder / "NvInferVersion.h").read_text()) for folder in folders}
    fitting = [folder for folder, line in found.items() if line and int(line[1]) == major]
    return (fitting or folders)[-1]


def _library() -> Path:
    return Path(os.environ.get(LIBRARY_VARIABLE, _BUILD / "x")).with_name(PLUGINS["cuda"])


def _built(name: str) -> Path:
    _ready()
    if not (_ENGINES / name).is_dir():
        raise SkippedError(f"the engine {name} was not built")
    return _ENGINES / name
