# SPDX-License-Identifier: Apache-2.0
"""``starkv build --backend trt``: an engine for TensorRT, or with ``--dry-run`` all but that."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.cli.console import note
from starkv.cli.engines import engine_directory, engines_home, exported_model
from starkv.cli.sources import SourceOptions
from starkv.cli.trt_packing import with_scales
from starkv.kv_packing.options import PackingOptions

if TYPE_CHECKING:
    from starkv.export.build.trt_options import TrtBuildOptions
    from starkv.export.build.trt_plan import BuildPlan
    from starkv.manifest import Manifest


def _place(options: "TrtBuildOptions", name: str, preset: str) -> Path:
    plain = engine_directory(name, "trt", preset)
    if options.kv_bits is None:
        return plain
    return plain.with_name(f"{plain.name}-{PackingOptions.of_codes(options.kv_bits).directory_suffix}")


def build_trt(
    model: str, quantization: str | None, out: Path | None, sources: SourceOptions, options: "TrtBuildOptions"
) -> Path:
    """Build the engine; returns its directory.

    Raises:
        StarkvError: see ``exported_model`` and ``build_trt_engine``.
    """
    from starkv.export.build.trt import build_trt_engine
    from starkv.export.build.trt_machine import find_build_machine

    # Before an export, which takes minutes.
    machine = find_build_machine(options)
    note(
        f"TensorRT {machine.tensorrt.full_version} on {machine.gpu.name}, {machine.compute_dtype}, plugins "
        f"{machine.plugins}"
    )
    calibration = sources.calibration
    if options.kv_bits is not None and calibration is not None:
        from starkv.calibration.prompts import read_prompts

        # They are needed last, which is minutes later for a large model.
        read_prompts(calibration)
        sources = replace(sources, calibrates_cache=True)
    with exported_model(model, quantization, out, sources, partial(_place, options)) as job:
        _note_storage(job.exported)

        def finish(engine: Path, manifest: "Manifest") -> "Manifest":
            if options.kv_bits is None:
                return manifest
            return with_scales(job.exported, engine, manifest, calibration, job.stages)

        build_trt_engine(job.exported, job.target, options, job.stages, job.temporary, finish)
    return job.target


def plan_build(
    model: str, quantization: str | None, out: Path | None, sources: SourceOptions, options: "TrtBuildOptions"
) -> "BuildPlan":
    """Plan the build; the lowered graphs stay in ``out``, with a script that builds them, or are deleted.

    Raises:
        StarkvError: see ``exported_model`` and ``plan_trt_build``.
    """
    from starkv.export.build.trt_commands import SCRIPT_NAME, trtexec_script
    from starkv.export.build.trt_machine import planned_target
    from starkv.export.build.trt_plan import plan_trt_build
    from starkv.export.staging import staged_directory

    target, dtype = planned_target(options), options.compute_dtype or "bfloat16"
    with (
        _kept_or_temporary(out) as place,
        exported_model(model, quantization, place, sources, partial(_place, options), SCRIPT_NAME) as job,
    ):
        _note_storage(job.exported)
        with staged_directory(place, SCRIPT_NAME) as staging:
            plan = plan_trt_build(job.exported, staging, target, dtype, options, job.stages)
            script = staging / SCRIPT_NAME
            script.write_text(trtexec_script(plan, options.plugins))
            script.chmod(script.stat().st_mode | 0o111)
    return plan


@contextmanager
def _kept_or_temporary(out: Path | None) -> Iterator[Path]:
    """``out``, or a place that is gone afterwards: beside the engines, as graphs of gigabytes may fit nowhere
    else."""
    if out is not None:
        yield out
        return
    above = next(folder for folder in (engines_home() / "x").absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".starkv-plan-", dir=above) as folder:
        yield Path(folder) / "plan"


def _note_storage(exported: Path) -> None:
    """Say what TensorRT can't keep as small as it is."""
    from starkv.export.record import read_record

    stored = read_record(exported).quantization
    groups = {"decoder": stored.decoder, "head": stored.head, "vision tower": stored.vision}
    if widened := [group for group, storage in groups.items() if storage == "int8"]:
        note(
            f"in 16 bits, twice the memory: {' and '.join(widened)}; TensorRT multiplies with no blocks of "
            "8-bit weights"
        )
