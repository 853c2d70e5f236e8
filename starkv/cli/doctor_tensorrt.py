# SPDX-License-Identifier: Apache-2.0
"""What ``starkv doctor`` says about TensorRT and the plugins: usable or not, what was found, what to do."""

from importlib.metadata import PackageNotFoundError, version

from starkv.errors import EngineError
from starkv.gpu import find_gpu
from starkv.trt_compat.module import load_tensorrt
from starkv.trt_compat.plugin_file import check_plugins, cuda_release, find_plugins

Row = tuple[bool, str, str]
_RUNTIMES_ONLY = ("tensorrt-lean", "tensorrt-dispatch")
"""Packages that build nothing; starkv doesn't use them."""


def tensorrt_row() -> Row:
    """The installed TensorRT, and whether starkv builds and runs engines with it here."""
    try:
        tensorrt = load_tensorrt()
    except EngineError as error:
        others = [f"{name} {found}" for name in _RUNTIMES_ONLY if (found := _installed(name))]
        found = f"only {', '.join(others)}" if others else "not usable"
        return False, found, f"only for TensorRT engines: {error}"
    if find_gpu() is None:
        return False, tensorrt.full_version, "no GPU: only `starkv build --backend trt --dry-run` works here"
    return True, tensorrt.full_version, "build an engine: starkv build MODEL --backend trt"


def plugins_row() -> Row:
    """The plugin library, and whether this machine's driver runs it."""
    try:
        plugins = find_plugins(None)
    except EngineError:
        return False, "not built", "needed only for TensorRT engines: `make plugin`"
    release = cuda_release(plugins)
    found = f"{plugins}, CUDA {release[0]}.{release[1]}" if release else str(plugins)
    gpu = find_gpu()
    if gpu is None:
        return False, found, "no GPU to run it on"
    try:
        check_plugins(plugins, gpu)
    except EngineError as error:
        return False, found, str(error)
    return True, found, ""


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
