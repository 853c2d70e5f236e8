# SPDX-License-Identifier: Apache-2.0
"""Exported model → engine directory for TensorRT."""

import shutil
from collections.abc import Callable
from pathlib import Path

from starkv.errors import EngineError
from starkv.export.build.files import enough_space, link_or_copy
from starkv.export.build.manifest import write_manifest
from starkv.export.build.trt_files import copy_libraries, lowered_bytes, side_files
from starkv.export.build.trt_machine import BuildMachine, find_build_machine
from starkv.export.build.trt_options import TrtBuildOptions
from starkv.export.build.trt_plan import BuildPlan, PlannedEngine, plan_trt_build
from starkv.export.lower.trt import DECODER
from starkv.export.progress import NoProgress, Progress
from starkv.export.record import read_record
from starkv.export.staging import staged_directory
from starkv.manifest import MANIFEST_NAME, Manifest, TensorRTBuild
from starkv.trt_compat.build_monitor import PERCENT
from starkv.trt_compat.building import build_plan
from starkv.trt_compat.module import TensorRT
from starkv.trt_compat.plugins import load_plugins
from starkv.trt_compat.running import Runtime
from starkv.trt_compat.timing_cache import TimingCache, default_directory, timing_cache_path

DECODER_PROFILES = ("prefill", "decode")
"""Names of the decoder's profiles, in their order."""
_LOWERED = ".lowered"


def build_trt_engine(
    export_dir: Path,
    out: Path,
    options: TrtBuildOptions,
    progress: Progress | None = None,
    link: bool = False,
    finish: Callable[[Path, Manifest], Manifest] | None = None,
) -> Manifest:
    """Build the engine directory ``out``; it appears complete or not at all, also after Ctrl-C.

    What a build that was interrupted has measured of kernels is not lost: the next one finds it.

    Args:
        export_dir: what ``export_model`` wrote.
        out: an engine there is replaced; anything else is not.
        options: what the user decides.
        progress: told about each step.
        link: share files with the export by hard links where the file system can, instead of copying them.
        finish: called with the engine that is complete but not in its place yet, and its manifest; puts
            something in, and returns the manifest that it wrote.

    Raises:
        EngineError: no GPU, no TensorRT, no plugins here, or TensorRT can't build; the message says what it
            said.
        UsageError: ``export_dir`` is no complete export, ``out`` holds something else, the disk has no room,
            or an option does not go with the model.
        KeyboardInterrupt: Ctrl-C.
    """
    progress = progress or NoProgress()
    record = read_record(export_dir)
    machine = find_build_machine(options)
    weights = lowered_bytes(export_dir, record)
    others = sum((export_dir / name).stat().st_size for name in side_files(record))
    needed = weights * (1 if options.strip else 2) + others + machine.plugins.stat().st_size
    with staged_directory(out, MANIFEST_NAME) as staging, enough_space(staging, needed):
        load_plugins(machine.tensorrt, machine.plugins)
        lowered = staging / _LOWERED
        lowered.mkdir()
        plan = plan_trt_build(
            export_dir, lowered, machine.tensorrt.version, machine.compute_dtype, options, progress
        )
        scratch = _build_plans(plan, staging, machine, progress)
        _keep_or_drop(plan, lowered, staging)
        names = side_files(record)
        progress.start("engine", len(names) + 1)
        for name in names:
            link_or_copy(export_dir / name, staging / name, link)
            progress.advance(name)
        copy_libraries(machine.plugins, staging)
        manifest = write_manifest(
            staging,
            plan.record,
            "trt",
            plan.compute_dtype,
            {"tensorrt": machine.tensorrt.full_version},
            _described(plan, machine, scratch),
        )
        progress.advance(MANIFEST_NAME)
        if finish is not None:
            manifest = finish(staging, manifest)
    return manifest


def _build_plans(
    plan: BuildPlan, directory: Path, machine: BuildMachine, progress: Progress
) -> dict[str, int]:
    """Build each plan; returns the scratch memory of each of their profiles."""
    cache = timing_cache_path(
        plan.options.timing_directory or default_directory(), machine.tensorrt.full_version, machine.gpu
    )
    timing, scratch = TimingCache(cache), dict[str, int]()
    for engine in plan.engines:
        progress.start(engine.plan_name, PERCENT)
        path = directory / engine.plan_name
        build_plan(
            machine.tensorrt,
            engine.graph.path,
            path,
            engine.profiles,
            engine.settings,
            timing,
            progress.advance,
        )
        names = _profile_names(engine)
        scratch |= dict(zip(names, _scratch(machine.tensorrt, path), strict=True))
    return scratch


def _scratch(tensorrt: TensorRT, path: Path) -> tuple[int, ...]:
    """Device memory for the activations of each profile; asking for it proves that the plan loads."""
    try:
        plan = Runtime(tensorrt).open(path)
    except EngineError as error:
        raise EngineError(
            f"{path.name} was built, but can't be loaded; the GPU's memory may be too small for it ({error})"
        ) from None
    return tuple(plan.scratch_bytes(profile) for profile in range(plan.profiles))


def _profile_names(engine: PlannedEngine) -> tuple[str, ...]:
    name = engine.graph.name
    return tuple(f"{name}.{profile}" for profile in DECODER_PROFILES) if name == DECODER else (name,)


def _keep_or_drop(plan: BuildPlan, lowered: Path, directory: Path) -> None:
    """Keep the graphs that weights are read from when the engine opens; the others are done with."""
    for engine in plan.engines:
        if engine.settings.strip:
            for path in engine.graph.files:
                path.rename(directory / path.name)
    shutil.rmtree(lowered)


def _described(plan: BuildPlan, machine: BuildMachine, scratch: dict[str, int]) -> TensorRTBuild:
    options, gpu = plan.options, machine.gpu
    return TensorRTBuild(
        version=machine.tensorrt.full_version,
        cuda=".".join(map(str, gpu.driver_cuda)),
        gpu=gpu.name,
        compute_capability=".".join(map(str, gpu.capability)),
        hardware_compatibility=options.hardware_compatibility,
        graphs={engine.graph.name: engine.graph.sha256 for engine in plan.engines},
        prefill_rows=options.prefill_rows,
        sessions=options.sessions,
        cache_rows=plan.cache_rows,
        image_patches=plan.image_patches,
        stripped=options.strip,
        weight_streaming=options.weight_streaming,
        scratch_bytes=scratch,
        weight_bytes={engine.graph.name: engine.graph.weight_bytes for engine in plan.engines},
        kv_bits=options.kv_bits,
        position_rows=plan.position_rows,
    )
