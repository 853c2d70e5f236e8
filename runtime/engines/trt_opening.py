# SPDX-License-Identifier: Apache-2.0
"""Whether a TensorRT engine fits this machine, and its plans, opened in the order that TensorRT needs."""

from dataclasses import dataclass
from pathlib import Path

from starkv.errors import EngineError
from starkv.gpu import Gpu, require_gpu
from starkv.manifest import Manifest, TensorRTBuild
from starkv.trt_compat.module import TensorRT, load_tensorrt
from starkv.trt_compat.plugin_file import check_plugins
from starkv.trt_compat.plugins import LIBRARY_NAME, load_plugins
from starkv.trt_compat.running import Plan, Runtime

VISION, DECODER, COMPRESS = "vision", "decoder", "compress"
_WITH_WEIGHTS = (VISION, DECODER)
_AMPERE = (8, 0)


@dataclass(frozen=True)
class Machine:
    """A machine that an engine fits."""

    gpu: Gpu
    tensorrt: TensorRT
    build: TensorRTBuild


def find_machine(directory: Path, manifest: Manifest) -> Machine:
    """See whether an engine fits this machine.

    The card is asked for before TensorRT: without one, TensorRT crashes instead of saying so.

    Args:
        directory: the engine.
        manifest: its own.

    Raises:
        EngineError: there is no card or no TensorRT, or they are others than the engine was built for.
    """
    build = build_of(directory, manifest)
    gpu = require_gpu()
    tensorrt = load_tensorrt()
    check_fits(directory, build, gpu, tensorrt)
    return Machine(gpu, tensorrt, build)


def open_plans(directory: Path, machine: Machine, weight_budget: int | None = None) -> dict[str, Plan]:
    """Open an engine's plans; plugins first, since plans name them.

    Args:
        directory: the engine.
        machine: that it fits.
        weight_budget: bytes of weights on the device where the engine streams them; TensorRT's choice if
            None.

    Returns:
        ``vision``, ``decoder`` and ``compress``.

    Raises:
        EngineError: a plan or the plugin library is damaged, or does not fit.
    """
    build, plugins = machine.build, directory / LIBRARY_NAME
    if plugins.is_file():
        check_plugins(plugins, machine.gpu)
    load_plugins(machine.tensorrt, plugins)
    runtime = Runtime(machine.tensorrt)
    plans = {}
    for name in (VISION, DECODER, COMPRESS):
        graph = directory / f"{name}.onnx"
        refit = graph if build.stripped and name in _WITH_WEIGHTS else None
        plans[name] = plan = runtime.open(directory / f"{name}.plan", refit)
        if build.weight_streaming and plan.streamable_bytes:
            plan.stream_weights(weight_budget)
    return plans


def build_of(directory: Path, manifest: Manifest) -> TensorRTBuild:
    """What the engine was built with.

    Raises:
        EngineError: its manifest does not say.
    """
    if manifest.tensorrt is None:
        raise EngineError(
            f"{directory / 'manifest.json'}: tensorrt is missing, so nothing says where the engine runs; "
            "build it again"
        )
    return manifest.tensorrt


def check_fits(directory: Path, build: TensorRTBuild, gpu: Gpu, tensorrt: TensorRT) -> None:
    """Refuse an engine that was built for something else.

    Raises:
        EngineError: names both, and the fix.
    """
    again = "build it again here: starkv build MODEL --backend trt"
    if tensorrt.full_version != build.version:
        raise EngineError(
            f"{directory} was built with TensorRT {build.version}, here is {tensorrt.full_version}; install "
            f"that version, or {again}"
        )
    here = ".".join(map(str, gpu.capability))
    fits = {
        "none": gpu.name == build.gpu,
        "same_compute_capability": here == build.compute_capability,
        "ampere_plus": gpu.capability >= _AMPERE,
    }[build.hardware_compatibility]
    if not fits:
        raise EngineError(
            f"{directory} was built for {build.gpu} (compute capability {build.compute_capability}, hardware "
            f"compatibility {build.hardware_compatibility}), here is {gpu.name} ({here}); {again}"
        )
    built, driver = int(build.cuda.partition(".")[0]), gpu.driver_cuda[0]
    if driver < built:
        raise EngineError(
            f"{directory} was built with CUDA {build.cuda}, but this driver runs CUDA "
            f"{'.'.join(map(str, gpu.driver_cuda))} at most; update the driver, or {again}"
        )
