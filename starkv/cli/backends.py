# SPDX-License-Identifier: Apache-2.0
"""Which backend an engine is built for, and whether an engine for TensorRT runs here."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starkv.errors import StarkvError, UsageError
from starkv.manifest import read_manifest

if TYPE_CHECKING:
    from starkv.export.build.trt_options import TrtBuildOptions


def choose_backend(
    wanted: str, for_ort: Sequence[str], for_trt: Sequence[str], options: "TrtBuildOptions"
) -> tuple[str, str]:
    """Settle ``auto``; returns the backend and why.

    Args:
        wanted: ``auto``, ``ort`` or ``trt``.
        for_ort: given options that are about ONNX Runtime's engines alone.
        for_trt: given options that are about TensorRT's alone.
        options: what a TensorRT engine would be built with.

    Raises:
        UsageError: unknown backend, or an option is about another one.
    """
    if wanted not in ("auto", "ort", "trt"):
        raise UsageError(f"unknown backend {wanted!r}; known: auto, ort, trt")
    foreign = for_trt if wanted == "ort" else for_ort if wanted == "trt" else ()
    if foreign:
        other = "trt" if wanted == "ort" else "ort"
        raise UsageError(f"{foreign[0]} is about engines of --backend {other}; leave it out")
    if for_ort and for_trt:
        raise UsageError(
            f"{for_ort[0]} is about engines of --backend ort, {for_trt[0]} about those of trt; leave one out"
        )
    if wanted != "auto":
        return wanted, "asked for"
    if for_ort:
        return "ort", f"{for_ort[0]} is about its engines"
    if for_trt:
        return "trt", f"{for_trt[0]} is about its engines"
    from starkv.export.build.trt_machine import reason_not_to_build

    missing = reason_not_to_build(options)
    if missing is None:
        return "trt", "TensorRT, a GPU and the plugins are here"
    return "ort", f"none for TensorRT can be built here ({missing})"


def reason_not_to_run(directory: Path) -> str | None:
    """Why a TensorRT engine does not fit this machine, or None if it does; its files are not read.

    What takes longer to find out is the engine's to say when it opens.
    """
    from starkv.gpu import require_gpu
    from starkv.trt_compat.module import load_tensorrt

    try:
        build = read_manifest(directory).tensorrt
        gpu, tensorrt = require_gpu(), load_tensorrt()
    except StarkvError as error:
        return str(error)
    if build is None:
        return f"{directory} is no engine for TensorRT"
    if build.version != tensorrt.full_version:
        return f"built with TensorRT {build.version}, {tensorrt.full_version} is installed"
    capability = ".".join(map(str, gpu.capability))
    fits = {
        "none": (build.gpu, build.compute_capability) == (gpu.name, capability),
        "same_compute_capability": build.compute_capability == capability,
        "ampere_plus": gpu.capability >= (8, 0),
    }
    if not fits[build.hardware_compatibility]:
        return f"built on {build.gpu} for its like, here is {gpu.name} ({capability})"
    return None
