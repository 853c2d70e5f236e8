# SPDX-License-Identifier: Apache-2.0
"""From an ONNX file to a plan: everything of TensorRT's builder that starkv uses.

Networks are strongly typed: what a tensor is in the file, it is in the plan.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.errors import EngineError
from starkv.manifest import HardwareCompatibility
from starkv.trt_compat.build_monitor import BuildMonitor, Report, make_monitor, run_stoppable
from starkv.trt_compat.module import TensorRT, TensorRTLog, make_logger
from starkv.trt_compat.plan_file import write_plan
from starkv.trt_compat.timing_cache import TimingCache
from starkv.trt_compat.version import SAME_COMPUTE_CAPABILITY, TensorRTVersion

if TYPE_CHECKING:
    import tensorrt as trt

AMPERE = (8, 0)
"""Compute capability of the first GPUs with bfloat16, and that plans for Ampere and newer run on."""

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|not enough memory", re.IGNORECASE)


@dataclass(frozen=True)
class ShapeRange:
    """Shapes of one input in one profile: the plan takes any between the first and the last."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    """What kernels are chosen for."""
    most: tuple[int, ...]


Profile = Mapping[str, ShapeRange]
"""Shapes of every input."""


@dataclass(frozen=True)
class PlanSettings:
    """How TensorRT builds a plan."""

    workspace: int | None
    """Most bytes that one layer may use beside its tensors; all of the card's if None."""
    optimization_level: int
    """0 to 5: how long TensorRT looks for fast kernels."""
    hardware_compatibility: HardwareCompatibility
    strip: bool
    """Leave the weights out; they are put in again when the engine opens."""
    weight_streaming: bool
    aliased: bool
    """A plugin writes into its inputs."""
    debug_tensors: tuple[str, ...] = ()
    """Tensors that can be looked at while the engine runs. Kernels are not merged across them."""


def check_hardware_compatibility(
    wanted: HardwareCompatibility, version: TensorRTVersion, capability: tuple[int, int] | None
) -> None:
    """Refuse what a TensorRT can't build for, or not on this GPU.

    Raises:
        EngineError: it can't.
    """
    if wanted == "same_compute_capability" and version < SAME_COMPUTE_CAPABILITY:
        raise EngineError(
            f"TensorRT {version} builds no plans for all GPUs of one compute capability, only "
            f"{SAME_COMPUTE_CAPABILITY} and later do; use --hardware-compatibility none or ampere_plus"
        )
    if wanted == "ampere_plus" and capability is not None and capability < AMPERE:
        raise EngineError(
            "plans for all GPUs since Ampere are built on one of them, but this one has compute capability "
            f"{capability[0]}.{capability[1]}; use --hardware-compatibility none"
        )


def build_plan(
    tensorrt: TensorRT,
    graph: Path,
    plan: Path,
    profiles: Sequence[Profile],
    settings: PlanSettings,
    timing: TimingCache,
    report: Report,
) -> None:
    """Build the plan of a graph. The plugins are loaded, and there is a GPU.

    Args:
        tensorrt: the installed one.
        graph: ``.onnx`` in the TensorRT dialect, its data beside it.
        plan: where to.
        profiles: at least one, which name every input of the graph.
        settings: how to build.
        timing: measurements of earlier builds, which grow by those of this one.
        report: called 100 times until the plan is there.

    Raises:
        EngineError: TensorRT can't; the message says what it said.
        KeyboardInterrupt: Ctrl-C; TensorRT has stopped.
        OSError: the plan can't be written.
    """
    log = TensorRTLog()
    logger = make_logger(tensorrt, log)
    builder = _make_builder(tensorrt, logger, log)
    flags = 1 << int(tensorrt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network: trt.INetworkDefinition = builder.create_network(flags)
    parser: trt.OnnxParser = tensorrt.module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise EngineError(
            f"TensorRT {tensorrt.full_version} can't read {graph.name}: {_parser_errors(parser, log)}"
        )
    _mark_debug(network, settings.debug_tensors)

    config: trt.IBuilderConfig = builder.create_builder_config()
    _configure(tensorrt, config, settings)
    for shapes in profiles:
        profile = _make_profile(builder, network, shapes)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(_refused_sizes(tensorrt, graph, settings, log.take()))
    cache = timing.attach(config)
    monitor = BuildMonitor(report)
    config.progress_monitor = make_monitor(tensorrt, monitor)
    built = run_stoppable(lambda: write_plan(tensorrt, builder, network, config, plan), monitor.stop)
    if not built:
        raise EngineError(_failure(tensorrt, plan, log.take()))
    timing.save(config, cache)
    monitor.finish(plan.name)


def _make_builder(tensorrt: TensorRT, logger: "trt.ILogger", log: TensorRTLog) -> "trt.Builder":
    try:
        builder: trt.Builder = tensorrt.module.Builder(logger)
    except TypeError:
        # What the binding makes of a null pointer.
        raise EngineError(
            f"TensorRT {tensorrt.full_version} finds no usable GPU ({log.take()}); its package must be made "
            "for a CUDA that the driver runs: check nvidia-smi"
        ) from None
    return builder


def _parser_errors(parser: "trt.OnnxParser", log: TensorRTLog) -> str:
    """Node and reason of each error; TensorRT's log where the parser names none."""
    found = []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        name, operator = error.node_name(), error.node_operator()
        node = f"node {name} ({operator}): " if name or operator else ""
        found.append(f"{node}{error.desc().strip()}")
    return "; ".join(found) or log.take()


def _mark_debug(network: "trt.INetworkDefinition", names: Sequence[str]) -> None:
    """Mark tensors by name; those that the parser has computed away are none any more.

    Raises:
        EngineError: TensorRT refuses one.
    """
    wanted = set(names)
    if not wanted:
        return
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        for output in range(layer.num_outputs):
            tensor: trt.ITensor = layer.get_output(output)
            if tensor.name in wanted and not network.mark_debug(tensor):
                raise EngineError(f"TensorRT can't show tensor {tensor.name}; leave it out of --debug-layers")


def _configure(tensorrt: TensorRT, config: "trt.IBuilderConfig", settings: PlanSettings) -> None:
    module = tensorrt.module
    # Names of layers, for profilers and for comparing engines layer by layer.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = settings.optimization_level
    if settings.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.aliased:
        config.set_preview_feature(module.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if settings.strip:
        config.set_flag(module.BuilderFlag.STRIP_PLAN)
        config.set_flag(module.BuilderFlag.REFIT_IDENTICAL)
    if settings.weight_streaming:
        config.set_flag(module.BuilderFlag.WEIGHT_STREAMING)
    if settings.hardware_compatibility == "ampere_plus":
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
    elif settings.hardware_compatibility == "same_compute_capability":
        level = module.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        config.hardware_compatibility_level = level


def _make_profile(
    builder: "trt.Builder", network: "trt.INetworkDefinition", shapes: Profile
) -> "trt.IOptimizationProfile":
    """A profile of all of the network's inputs."""
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        shape = shapes[name]
        profile.set_shape(name, shape.least, shape.usual, shape.most)
    return profile


def _refused_sizes(tensorrt: TensorRT, graph: Path, settings: PlanSettings, said: str) -> str:
    line = f"TensorRT {tensorrt.full_version} refuses the input sizes of {graph.name}: {said}"
    if settings.strip:
        # NvInfer.h, addOptimizationProfile: "at most once when building a refittable engine". TensorRT has
        # taken more since 8.6, but never said so.
        line += ". It promises one profile only where weights are left out: build without --strip-weights"
    return line


def _failure(tensorrt: TensorRT, plan: Path, said: str) -> str:
    line = f"TensorRT {tensorrt.full_version} can't build {plan.name}: {said}"
    if _OUT_OF_MEMORY.search(said):
        line += (
            ". The GPU's memory is too small: end other programs on it, or give less with --workspace, "
            "--prefill-rows, --sessions or --max-pixels"
        )
    return line
