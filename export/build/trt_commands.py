# SPDX-License-Identifier: Apache-2.0
"""The same build as command lines of ``trtexec``, NVIDIA's tool: to build by hand, or to report a problem."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from starkv.export.build.trt_plan import BuildPlan, PlannedEngine
from starkv.trt_compat.building import Profile, ShapeRange
from starkv.trt_compat.plugins import LIBRARY_NAME

SCRIPT_NAME = "trtexec.sh"
_MIB = 2**20
_LEVELS = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}


def trtexec_command(engine: PlannedEngine, plugins: Path | None = None) -> str:
    """One command line; its files lie in the working directory.

    Args:
        engine: what to build.
        plugins: their library; ``libstarkv_trt.so`` of the working directory if None.
    """
    return shlex.join(("trtexec", *_arguments(engine, plugins or Path(LIBRARY_NAME))))


def trtexec_script(plan: BuildPlan, plugins: Path | None = None) -> str:
    """A shell script that builds all plans from the graphs beside it."""
    head = (
        "#!/bin/sh",
        f"# {plan.record.name} for TensorRT {plan.target}; wants {LIBRARY_NAME} beside it.",
        'set -e; cd "$(dirname "$0")"',
    )
    return "\n".join([*head, *(trtexec_command(engine, plugins) for engine in plan.engines)]) + "\n"


def _arguments(engine: PlannedEngine, plugins: Path) -> Iterator[str]:
    settings = engine.settings
    yield f"--onnx={engine.graph.path.name}"
    yield f"--saveEngine={engine.plan_name}"
    yield "--stronglyTyped"
    yield "--skipInference"
    yield f"--dynamicPlugins={plugins if plugins.is_absolute() else f'./{plugins}'}"
    yield "--profilingVerbosity=detailed"
    yield f"--builderOptimizationLevel={settings.optimization_level}"
    if settings.aliased:
        yield "--preview=+aliasedPluginIO1003"
    if settings.workspace is not None:
        yield f"--memPoolSize=workspace:{settings.workspace / _MIB:g}M"
    if settings.strip:
        yield "--stripWeights"
    if settings.weight_streaming:
        yield "--allowWeightStreaming"
    if settings.hardware_compatibility in _LEVELS:
        yield f"--hardwareCompatibilityLevel={_LEVELS[settings.hardware_compatibility]}"
    if settings.debug_tensors:
        yield f"--markDebug={','.join(settings.debug_tensors)}"
    for index, profile in enumerate(engine.profiles):
        yield f"--profile={index}"
        yield f"--minShapes={_shapes(profile, 'least')}"
        yield f"--optShapes={_shapes(profile, 'usual')}"
        yield f"--maxShapes={_shapes(profile, 'most')}"


def _shapes(profile: Profile, which: str) -> str:
    return ",".join(f"{name}:{_dims(shape, which)}" for name, shape in profile.items())


def _dims(shape: ShapeRange, which: str) -> str:
    dims: tuple[int, ...] = getattr(shape, which)
    return "x".join(map(str, dims))
