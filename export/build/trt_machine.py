# SPDX-License-Identifier: Apache-2.0
"""Whether this machine can build engines for TensorRT: asked before hours of work, in the order that is safe.

TensorRT itself must not be asked first: without a GPU its objects crash the process.
"""

from dataclasses import dataclass
from pathlib import Path

from starkv.errors import EngineError, StarkvError, UsageError
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.gpu import Gpu, require_gpu
from starkv.manifest import ComputeDtype
from starkv.trt_compat.building import AMPERE, check_hardware_compatibility
from starkv.trt_compat.module import TensorRT, load_tensorrt
from starkv.trt_compat.plugin_file import check_plugins, find_plugins
from starkv.trt_compat.version import OLDEST, TensorRTVersion


@dataclass(frozen=True)
class BuildMachine:
    """What an engine is built with."""

    gpu: Gpu
    tensorrt: TensorRT
    plugins: Path
    compute_dtype: ComputeDtype


def find_build_machine(options: TrtBuildOptions) -> BuildMachine:
    """Look for all that a build needs.

    Raises:
        EngineError: there is no GPU, no TensorRT that starkv knows, no plugin library that fits, or they
            can't do what the options ask for.
        UsageError: the target is another TensorRT than the installed one.
    """
    gpu = require_gpu()
    tensorrt = load_tensorrt()
    if options.target not in (None, tensorrt.version):
        raise UsageError(
            f"TensorRT {tensorrt.full_version} is installed, and a plan runs on the version that built it: "
            f"build for {options.target} where that is installed, or add --dry-run"
        )
    check_hardware_compatibility(options.hardware_compatibility, tensorrt.version, gpu.capability)
    dtype = options.compute_dtype or ("bfloat16" if gpu.capability >= AMPERE else "float16")
    if dtype == "bfloat16" and gpu.capability < AMPERE:
        raise EngineError(f"{gpu.name} has no bfloat16; use --compute-dtype float16")
    plugins = find_plugins(options.plugins)
    check_plugins(plugins, gpu)
    return BuildMachine(gpu, tensorrt, plugins, dtype)


def reason_not_to_build(options: TrtBuildOptions) -> str | None:
    """Why this machine can't build such an engine, or None if it can."""
    try:
        find_build_machine(options)
    except StarkvError as error:
        return str(error)
    return None


def planned_target(options: TrtBuildOptions) -> TensorRTVersion:
    """TensorRT to plan for without building: the one asked for, the installed one, or the oldest.

    Raises:
        EngineError: the hardware compatibility that is asked for does not exist there.
    """
    target = options.target
    if target is None:
        try:
            target = load_tensorrt().version
        except EngineError:
            target = OLDEST
    check_hardware_compatibility(options.hardware_compatibility, target, None)
    return target
