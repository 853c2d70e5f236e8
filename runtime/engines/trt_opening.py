# SPDX-License-Identifier: Apache-2.0
"""Whether a TensorRT engine fits this machine, and its plans, opened in the order that TensorRT needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starkv.errors import EngineError
from starkv.gpu import Gpu, require_gpu
from starkv.kernels.c_abi import KernelAbi, KernelError
from starkv.kernels.library_paths import KERNELS
from starkv.manifest import Manifest, TensorRTBuild, sha256_of
from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.runtime.engines.device_packing import DevicePacking
from starkv.runtime.engines.trt_tensors import COMPRESS, DECODER, VISION, check_tensors, expected_tensors
from starkv.runtime.kv.codecs import open_codec
from starkv.runtime.kv.quantized import QuantizedCodec
from starkv.trt_compat.module import TensorRT, load_tensorrt
from starkv.trt_compat.plugin_file import check_plugins
from starkv.trt_compat.plugins import LIBRARY_NAME, load_plugins
from starkv.trt_compat.running import Plan, Runtime

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


def open_plans(
    directory: Path, manifest: Manifest, machine: Machine, weight_room: int | None = None
) -> dict[str, Plan]:
    """Open an engine's plans; plugins first, since plans name them.

    Args:
        directory: the engine.
        manifest: its own.
        machine: that it fits.
        weight_room: bytes for weights on the device where the engine streams them; all of them if None.

    Returns:
        ``vision``, ``decoder`` and ``compress``.

    Raises:
        EngineError: a plan or the plugin library is damaged, or does not fit.
    """
    build, plugins = machine.build, directory / LIBRARY_NAME
    _check_libraries(directory, manifest)
    if plugins.is_file():
        check_plugins(plugins, machine.gpu)
    load_plugins(machine.tensorrt, plugins)
    runtime, plans = Runtime(machine.tensorrt), dict[str, Plan]()
    for name, tensors in expected_tensors(manifest).items():
        graph = directory / f"{name}.onnx"
        refit = graph if build.stripped and name in _WITH_WEIGHTS else None
        plans[name] = runtime.open(directory / f"{name}.plan", refit)
        check_tensors(plans[name], tensors)
    if build.weight_streaming and weight_room is not None:
        _place_weights(plans, build, weight_room)
    return plans


def _check_libraries(directory: Path, manifest: Manifest) -> None:
    """Compare code with its recorded hash, whether files are verified or not: loading half of a library
    crashes the process.

    Raises:
        EngineError: a library was changed.
    """
    for name, expected in manifest.files.items():
        path = directory / name
        if path.suffix == ".so" and path.is_file() and sha256_of(path) != expected:
            raise EngineError(
                f"{path} was changed or damaged since the build (sha256 differs); build it again"
            )


def _place_weights(plans: dict[str, Plan], build: TensorRTBuild, room: int) -> None:
    """Share the room for weights out.

    The decoder, which reads its own for every token, goes first; the vision tower runs once per image.
    """
    for name in plans:
        room -= max(0, build.weight_bytes.get(name, 0) - plans[name].streamable_bytes)
    for name in (DECODER, VISION, COMPRESS):
        streamable = plans[name].streamable_bytes
        if streamable:
            share = min(streamable, max(0, room))
            plans[name].stream_weights(share)
            room -= share


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


def kernels_beside(directory: Path) -> KernelAbi | None:
    """The kernels' library of an engine; None where it has none, or one that doesn't fit."""
    path = directory / KERNELS["cuda"]
    try:
        library = KernelAbi(path) if path.is_file() else None
    except KernelError:
        return None
    return library if library and library.device == "cuda" else None


def open_packing(
    directory: Path, manifest: Manifest, memory: CudaMemory, kernels: KernelAbi | None
) -> DevicePacking | None:
    """Put an engine's packing on its card; None where it has none.

    Raises:
        EngineError: its file is damaged, or another than the plan was built for, or there are no kernels.
    """
    build, codec = build_of(directory, manifest), open_codec(directory, manifest)
    if codec is None:
        return None
    if not isinstance(codec, QuantizedCodec) or codec.packing.bits != build.kv_bits:
        raise EngineError(
            f"{directory} packs its cache as {codec.name}, but its plan was built for codes of "
            f"{build.kv_bits or 'no'} bits; build it again"
        )
    if kernels is None:
        raise EngineError(
            f"{directory / KERNELS['cuda']} is missing or does not load here, and packs the cache; build the "
            "kernels (`make plugin`) and the engine again"
        )
    return DevicePacking(memory, codec, kernels, build.position_rows)


def open_host_graph(directory: Path, threads: int, graph: str) -> Any:
    """A session of ONNX Runtime for a method that runs on the processor.

    Raises:
        EngineError: it is not installed, or can't load the graph.
    """
    try:
        import onnxruntime
    except ImportError:
        raise EngineError(
            "this KV method runs on the processor and needs ONNX Runtime; pip install 'starkv[cpu]', or use "
            "star_kv"
        ) from None
    path, options = directory / f"{graph}.onnx", onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises many classes, all of its own
        reason = str(error).splitlines()[0]
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} can't load {path}: {reason}") from None
