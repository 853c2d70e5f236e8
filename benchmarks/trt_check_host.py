# SPDX-License-Identifier: Apache-2.0
"""Steps of ``make trt-check`` that need neither TensorRT nor a GPU."""

import os
import shutil
import sys
from pathlib import Path

from gpu_steps import ROOT, Result, SkippedError, run_command
from trt_check_fetch import HEADERS_VARIABLE, LEAN, header_folders, lean_runtime
from trt_check_tests import Outcome, run_tests

_PLUGINS = "tests/kernels/test_plugins_trt.py"
_ALL_VERSIONS = {"STARKV_TENSORRT_VERSIONS": "all"}
_ON_PATH = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")


def names() -> Result:
    """Every name of TensorRT that starkv uses, against the bindings of twelve releases."""
    return run_tests(["tests/trt/test_api.py", "tests/trt/test_api_checker.py"], "", _ALL_VERSIONS).result()


def types() -> Result:
    """mypy on stubs of the same releases."""
    return run_tests(["tests/trt/test_stubs.py"], "", _ALL_VERSIONS).result()


def rules() -> Result:
    """Lowered graphs against the parser's rules; builds and engines on the strict fakes."""
    files = sorted(path.relative_to(ROOT) for path in (ROOT / "tests" / "trt").glob("test_*.py"))
    apart = ("test_api", "test_stubs", "test_end_to_end_plugins")
    return run_tests([str(path) for path in files if not path.name.startswith(apart)]).result()


def plugins() -> Result:
    """The plugins against the headers of each version: compiled, exports, harness, enqueue on host memory."""
    return run_tests([_PLUGINS], "not registry").result()


def sanitizers() -> Result:
    """The harness and the kernels' checks under the address and undefined-behaviour sanitizers."""
    cmake, ctest = tool("cmake"), tool("ctest")
    folders = header_folders()
    if not folders:
        raise SkippedError(f"no TensorRT headers ({HEADERS_VARIABLE})")
    build = str(ROOT / "build" / "trt-check-sanitized")
    options = [f"-DTENSORRT_INCLUDE_DIR={folders[-1]}", "-DSTARKV_CUDA=OFF", "-DSTARKV_SANITIZE=ON"]
    report = run_command([cmake, "-S", "plugins_trt", "-B", build, *options])
    if "no CUDA toolkit" in report:
        raise SkippedError("no CUDA toolkit, whose cuda_runtime_api.h TensorRT's headers include")
    run_command([cmake, "--build", build, "--parallel"])
    output = run_command([ctest, "--test-dir", build, "--output-on-failure"])
    return next(line for line in output.splitlines() if "tests passed" in line), "", {}


def registries() -> Result:
    """One build of the plugins in the registries of real TensorRT libraries."""
    folders = header_folders()
    if not folders:
        raise SkippedError(f"no TensorRT headers ({HEADERS_VARIABLE})")
    # The oldest and the newest: what is built with one must work with the other.
    headers = os.pathsep.join(map(str, dict.fromkeys((folders[0], folders[-1]))))
    outcome, missing, done = Outcome(), "", []
    for release in LEAN:
        try:
            runtime = lean_runtime(release)
        except SkippedError as error:
            missing = str(error)
            continue
        settings = {"PYTHONPATH": str(runtime), HEADERS_VARIABLE: headers}
        outcome += run_tests([_PLUGINS], "registry", settings)
        done.append(release)
    if not done:
        raise SkippedError(missing)
    detail, table, figures = outcome.result()
    detail = f"TensorRT {', '.join(done)}: {detail}" + (f"; {missing}" if missing else "")
    return detail, table, {**figures, "releases": done}


def sequence_on_processor() -> Result:
    """gui-tiny's tokens from the strict fakes with the real plugins, built for the processor."""
    settings = {"STARKV_TRT_PLUGINS": "cpu"}
    return run_tests(["tests/trt/test_end_to_end_plugins.py"], "", settings).result()


def tool(name: str) -> str:
    """A program of the environment or of the system.

    Raises:
        SkippedError: there is none.
    """
    found = shutil.which(name, path=_ON_PATH)
    if not found:
        raise SkippedError(f"no {name} on PATH")
    return found
