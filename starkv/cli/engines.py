# SPDX-License-Identifier: Apache-2.0
"""Find the engine that a user names, and build it where there is none yet."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.cli.backends import reason_not_to_run
from starkv.cli.console import StageProgress, note, progress
from starkv.cli.sources import SourceOptions, find_source
from starkv.errors import UsageError
from starkv.manifest import MANIFEST_NAME, ComputeDtype, Manifest

if TYPE_CHECKING:
    from starkv.kv_packing.options import PackingOptions

NO_OPTIONS = SourceOptions()


def engines_home() -> Path:
    """Directory of the engines that are found by name: ``$STARKV_ENGINES``, or ``engines`` here."""
    return Path(os.environ.get("STARKV_ENGINES", "engines"))


def engine_directory(name: str, backend: str, quantization: str, device: str = "cpu") -> Path:
    """Where the engine of a model is kept."""
    place = backend if device == "cpu" else f"{backend}-{device}"
    return engines_home() / f"{name}-{place}-{quantization}"


@contextmanager
def made_parents(target: Path) -> Iterator[None]:
    """Make the directories above ``target``; those that were missing vanish again if the block fails.

    Raises:
        UsageError: there is a file in the way.
    """
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{target} can't be made: {above} is no directory; choose another --out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@dataclass(frozen=True)
class BuildJob:
    """An exported model on its way to an engine."""

    exported: Path
    temporary: bool
    """The export is deleted afterwards, so the engine may share its files."""
    target: Path
    stages: StageProgress


@contextmanager
def exported_model(
    model: str,
    quantization: str | None,
    out: Path | None,
    options: SourceOptions,
    place: Callable[[str, str], Path],
    marker: str = MANIFEST_NAME,
) -> Iterator[BuildJob]:
    """Export a model beside the engine that the block builds from it, or take a folder of ``export``.

    Args:
        model: card's name, checkpoint folder, or a folder of ``export``.
        quantization: preset; the card's, or the export's, if None.
        out: where to; ``place`` says so if None.
        options: what the user says about weights.
        place: directory of the engine of a model (name) and preset.
        marker: file by which what the block makes is recognised.

    Raises:
        StarkvError: see ``find_source`` and ``export_model``, or an option comes too late for an export.
    """
    from starkv.export.record import RECORD_NAME, read_record
    from starkv.export.staging import check_replaceable

    if (Path(model) / RECORD_NAME).is_file():
        record = read_record(Path(model))
        preset = record.quantization.preset
        if options.shape_weights:
            raise UsageError(
                f"{model} is exported already; --checkpoint, --random-weights and --calibration come earlier"
            )
        if quantization not in (None, preset):
            raise UsageError(
                f"{model} was exported as {preset}, not {quantization}; leave --quant out, or export again"
            )
        target = out or place(record.name, preset)
        check_replaceable(target, marker)
        with made_parents(target), progress() as stages:
            yield BuildJob(Path(model), False, target, stages)
        return
    from starkv.export.export_model import export_model
    from starkv.export.resume import partial_directory

    source = find_source(model, quantization, options)
    target = out or place(source.card.name, source.preset.name)
    # The build checks it too, but that is minutes later for a large model.
    check_replaceable(target, marker)
    # Beside the engine, on the same file system; what was finished before an interruption is found again.
    exported = target.absolute().with_name(f".{target.name}.export")
    if exported.exists() or partial_directory(exported).exists():
        note(f"going on with an earlier run that was interrupted, see {exported.parent}")
    with (
        made_parents(target),
        progress() as stages,
        source.checkpoint(target, stages) as folder,
    ):
        export_model(
            folder,
            source.card,
            exported,
            source.preset,
            stages,
            calibration=source.calibration,
            reuse=True,
        )
        yield BuildJob(exported, True, target, stages)
        shutil.rmtree(exported)


def build_engine(
    model: str,
    quantization: str | None,
    out: Path | None,
    prepack: bool = False,
    options: SourceOptions = NO_OPTIONS,
    compute_dtype: ComputeDtype = "float32",
    packing: "PackingOptions | None" = None,
) -> tuple[Path, Manifest]:
    """Build an engine for ONNX Runtime.

    Args:
        model: card's name, checkpoint folder, or a folder of ``export``.
        quantization: preset; the card's, or the export's, if None.
        out: where to; among the engines that are found by name if None.
        prepack: also store the form compiled for this processor.
        options: what the user says about weights.
        compute_dtype: of activations and KV cache; one of 16 bits makes an engine for GPUs.
        packing: of its cache.

    Raises:
        StarkvError: see ``exported_model``, ``build_ort_engine`` and ``pack_engine``.
    """
    from starkv.cli.packing import pack_engine
    from starkv.export.build.ort import build_ort_engine

    if packing is not None and (prepack or compute_dtype != "float32"):
        raise UsageError(
            "a packed cache needs an engine for processors that is not prepacked; leave --prepack and "
            "--device cuda out, or --kv-quant and --kv-rank"
        )

    if packing is not None and options.calibration is not None:
        from starkv.calibration.prompts import read_prompts

        # They are needed last, which is minutes later for a large model.
        read_prompts(options.calibration)
        options = replace(options, calibrates_cache=True)

    def place(name: str, preset: str) -> Path:
        plain = engine_directory(name, "ort", preset, "cpu" if compute_dtype == "float32" else "cuda")
        return plain if packing is None else plain.with_name(f"{plain.name}-{packing.directory_suffix}")

    with exported_model(model, quantization, out, options, place) as job:
        if packing is None:
            manifest = build_ort_engine(
                job.exported, job.target, job.stages, prepack, link=job.temporary, compute_dtype=compute_dtype
            )
            return job.target, manifest
        # Calibration runs the plain engine; the packed one takes over its files.
        beside = job.target.absolute().parent
        with tempfile.TemporaryDirectory(prefix=f".{job.target.name}.plain-", dir=beside) as folder:
            plain = Path(folder) / "engine"
            build_ort_engine(job.exported, plain, job.stages)
            manifest = pack_engine(plain, job.target, packing, job.stages, options.calibration, link=True)
    return job.target, manifest


def settle_dtype(device: str, compute_dtype: str | None) -> ComputeDtype:
    """Dtype of an engine for ``cpu`` or ``cuda``: the one asked for, or the device's own.

    Raises:
        UsageError: there is no such device or dtype, or they don't go together.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}; an engine is built for cpu or cuda")
    if device == "cpu" and compute_dtype in (None, "float32"):
        return "float32"
    if device == "cuda" and compute_dtype in (None, "bfloat16"):
        return "bfloat16"
    if device == "cuda" and compute_dtype == "float16":
        return "float16"
    known = "float32" if device == "cpu" else "bfloat16 or float16"
    raise UsageError(f"an engine for {device} computes in {known}, not in {compute_dtype}")


def find_engine(
    name: str,
    quantization: str | None = None,
    device: str = "auto",
    packing: "PackingOptions | None" = None,
) -> Path:
    """Directory of the engine called ``name``; a model's engine that doesn't exist yet is built.

    Args:
        name: directory, or a model.
        quantization: of a model's engine; the card's by default.
        device: that a model's engine is for; with ``auto`` the GPU if ONNX Runtime can use one, unless only
            the processor's engine is there already. An engine for TensorRT that fits this machine goes first,
            but not where the processor is asked for.
        packing: of a model's engine; such an engine is one for the processor.

    Raises:
        UsageError: ``name`` is neither a directory nor a model, or there is no such device, or none that
            packs.
    """
    if packing is not None and not Path(name).is_dir():
        return _find_packed(name, quantization, device, packing)
    if (Path(name) / MANIFEST_NAME).is_file():
        return Path(name)
    if Path(name).is_dir() or os.sep in name:
        raise UsageError(
            f"{name} is no engine directory (it has no {MANIFEST_NAME}); build one with `starkv build`"
        )
    from starkv.export.cards import load_card
    from starkv.runtime.engines.opening import parse_device
    from starkv.runtime.engines.ort_cuda_gpu import ready_gpu

    card = load_card(name)
    chosen = parse_device(device)
    devices = [chosen] if chosen else ["cuda", "cpu"] if ready_gpu() else ["cpu"]
    preset = quantization or card.quantization
    compiled = engine_directory(name, "trt", preset)
    if chosen != "cpu" and (compiled / MANIFEST_NAME).is_file():
        misfit = reason_not_to_run(compiled)
        if misfit is None:
            return compiled
        note(f"not taking {compiled}: {misfit}")
    places = [engine_directory(name, "ort", preset, each) for each in devices]
    for directory in places:
        if (directory / MANIFEST_NAME).is_file():
            return directory
    note(f"no engine at {places[0]} yet: building it once")
    return build_engine(name, quantization, None, compute_dtype=settle_dtype(devices[0], None))[0]


def _find_packed(name: str, quantization: str | None, device: str, packing: "PackingOptions") -> Path:
    """The engine of a model that packs its cache; made from the plain one if there is none."""
    if device != "cpu":
        from starkv.export.cards import load_card

        preset = quantization or load_card(name).quantization
        compiled = engine_directory(name, "trt", preset)
        compiled = compiled.with_name(f"{compiled.name}-{packing.directory_suffix}")
        if (compiled / MANIFEST_NAME).is_file():
            misfit = reason_not_to_run(compiled)
            if misfit is None:
                return compiled
            note(f"not taking {compiled}: {misfit}")
    if device == "cuda":
        raise UsageError(
            "on GPUs packed caches run in TensorRT: `starkv build MODEL --backend trt --kv-quant int8`; in "
            "ONNX Runtime they run on processors, leave --device cuda out"
        )
    plain = find_engine(name, quantization, "cpu")
    target = plain.with_name(f"{plain.name}-{packing.directory_suffix}")
    if not (target / MANIFEST_NAME).is_file():
        from starkv.cli.packing import pack_engine

        note(f"no engine at {target} yet: packing {plain} once")
        with progress() as stages:
            pack_engine(plain, target, packing, stages)
    return target
