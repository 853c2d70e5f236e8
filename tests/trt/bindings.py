# SPDX-License-Identifier: Apache-2.0
"""TensorRT's real Python bindings, of several versions, without TensorRT: to ask about names and types.

The wheels of the bindings are small and need nine functions of TensorRT's libraries. Stand-ins that return
nothing are enough to import them. Nothing works then, but everything is there to be looked at. Wheels come
from the package index, or from the folder that ``STARKV_TENSORRT_BINDINGS`` names. They are NVIDIA's and stay
in ``build/``: nothing made from them is part of this repository.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starkv.trt_compat.version import TensorRTVersion

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "tensorrt-bindings"
WHEELS_VARIABLE = "STARKV_TENSORRT_BINDINGS"
"""A folder of wheels, in place of the package index."""
VERSIONS_VARIABLE = "STARKV_TENSORRT_VERSIONS"
"""``all`` adds the versions of :data:`BOUNDARIES`, and types are checked with every version."""
CHECKED = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.1.0.106", "11.4.0.106")
"""Releases of the versions in ``starkv.trt_compat.version.CHECKED``."""
BOUNDARIES = (
    "10.6.0",
    "10.7.0",
    "10.8.0.43",
    "10.9.0.34",
    "10.12.0.36",
    "10.14.1.48.post1",
    "10.15.1.29",
)
"""Releases on either side of the versions that starkv's code asks for."""

_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_STAND_IN = """
void* createInferBuilder_INTERNAL(void* logger, int version) { return 0; }
void* createInferRefitter_INTERNAL(void* engine, void* logger, int version) { return 0; }
void* createInferRuntime_INTERNAL(void* logger, int version) { return 0; }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) { return 0; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) { return 0; }
void* getBuilderPluginRegistry(int capability) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
void* getPluginRegistry(void) { return 0; }
_Bool initLibNvInferPlugins(void* logger, char const* name) { return 0; }
"""
_SECONDS = 120


class UnavailableError(Exception):
    """The bindings can't be had here; says why."""


@dataclass(frozen=True)
class Bindings:
    """Bindings of one release."""

    release: str
    folder: Path
    """Of the package ``tensorrt_bindings``."""
    libraries: Path
    """Of the stand-ins."""

    @property
    def version(self) -> TensorRTVersion:
        return TensorRTVersion.parse(self.release)

    def python(self, *arguments: str | Path) -> str:
        """Output of a Python that can import ``tensorrt_bindings``.

        Raises:
            UnavailableError: it fails.
        """
        environment = dict(os.environ, LD_LIBRARY_PATH=str(self.libraries), PYTHONPATH=str(self.folder))
        return _run([sys.executable, *map(str, arguments)], environment)


def wanted() -> tuple[str, ...]:
    """Releases to look at."""
    return CHECKED + BOUNDARIES if os.environ.get(VERSIONS_VARIABLE) == "all" else CHECKED


@cache
def bindings(release: str) -> Bindings:
    """Fetch the bindings of a release, unless they are here already.

    Raises:
        UnavailableError: no index, no wheel for this Python and machine, or no C compiler.
    """
    if sys.platform != "linux":
        raise UnavailableError("the stand-ins for TensorRT's libraries are made for Linux only")
    libraries = CACHE / "stand-ins" / release.partition(".")[0]
    if not libraries.is_dir():
        _into(libraries, lambda folder: _compile(folder, libraries.name))
    folder = CACHE / f"{release}-cp{sys.version_info.major}{sys.version_info.minor}"
    if not folder.is_dir():
        _into(folder, lambda place: _unpack(release, place))
    return Bindings(release, folder, libraries)


def _compile(folder: Path, major: str) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise UnavailableError("no C compiler (cc) for the stand-ins of TensorRT's libraries")
    source = folder / "stand_in.c"
    source.write_text(_STAND_IN)
    for library in _LIBRARIES:
        name = f"lib{library}.so.{major}"
        _run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)])


def _unpack(release: str, folder: Path) -> None:
    # Wheels for CUDA 13 exist since 10.13.
    cuda = "cu12" if TensorRTVersion.parse(release) < TensorRTVersion(10, 13) else "cu13"
    with tempfile.TemporaryDirectory() as downloads:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", downloads]
        if wheels := os.environ.get(WHEELS_VARIABLE):
            options += ["--no-index", "--find-links", wheels]
        wheel = f"tensorrt_{cuda}_bindings=={release}"
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", *options, wheel])
        for path in Path(downloads).glob("*.whl"):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)


def _into(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder's contents beside it: what is there is complete, even if several processes do this."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        make(made)
        try:
            made.rename(folder)
        except OSError:
            # Another process was quicker.
            if not folder.is_dir():
                raise


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"`{' '.join(command[:4])} …` takes more than {_SECONDS} seconds") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        # pip says much, but marks the reason.
        reasons = [line for line in lines if line.startswith("ERROR:")] or lines
        raise UnavailableError(f"`{' '.join(command[:4])} …` failed: {reasons[-1]}")
    return done.stdout
