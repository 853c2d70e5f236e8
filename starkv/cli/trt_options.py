# SPDX-License-Identifier: Apache-2.0
"""Options of ``starkv build`` that are about engines for TensorRT."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starkv.errors import UsageError
from starkv.manifest import ComputeDtype, HardwareCompatibility

if TYPE_CHECKING:
    from starkv.export.build.trt_options import TrtBuildOptions

GIB = 2**30
_PANEL = "TensorRT engines"
_LEVELS: dict[str, HardwareCompatibility] = {
    "none": "none",
    "same_compute_capability": "same_compute_capability",
    "ampere_plus": "ampere_plus",
}
DTYPES: dict[str, ComputeDtype] = {"bfloat16": "bfloat16", "float16": "float16"}


def _option(name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, show_default=False, rich_help_panel=_PANEL, **more)


TargetVersion = Annotated[
    str | None,
    _option(
        "--target-version",
        "TensorRT that will run the engine, such as 10.3 (JetPack 6). Another than the installed one only "
        "with --dry-run. [the installed one]",
    ),
]
DryRun = Annotated[
    bool,
    _option(
        "--dry-run",
        "All but the build, on any machine: lower and check the graphs, show sizes and settings. With --out "
        "the graphs stay, with a trtexec.sh that builds them.",
    ),
]
Sessions = Annotated[int | None, _option("--sessions", "Most sessions that decode in one step. [8]", min=1)]
PrefillRows = Annotated[
    int | None,
    _option(
        "--prefill-rows",
        "Most tokens of one prefill call; a longer prompt takes several. Fewer need less memory. [2048]",
        min=1,
    ),
]
MaxContext = Annotated[
    int | None,
    _option("--max-context", "Most tokens of one session; fewer need less memory. [the model's]", min=1),
]
MaxPixels = Annotated[
    int | None,
    _option(
        "--max-pixels",
        "Larger screenshots are scaled down to this; fewer need less memory. 2109744 is full HD. [the "
        "model's]",
        min=1,
    ),
]
StripWeights = Annotated[
    bool,
    _option(
        "--strip-weights",
        "Plans without weights, which are read from the graphs beside them when the engine opens: a plan of "
        "another TensorRT or GPU then costs megabytes.",
    ),
]
WeightStreaming = Annotated[
    bool,
    _option(
        "--weight-streaming",
        "Let weights stay in host memory as far as the GPU has no room for them. Slower; of no use on a "
        "Jetson, whose memory is one.",
    ),
]
HardwareLevel = Annotated[
    str | None,
    _option(
        "--hardware-compatibility",
        f"GPUs that the engine runs on: {', '.join(_LEVELS)}. All but none may be slower. [none: this "
        "model of GPU]",
    ),
]
Workspace = Annotated[
    float | None,
    _option("--workspace", "GiB that one layer may use beside its tensors. [all of the GPU]"),
]
OptimizationLevel = Annotated[
    int | None,
    _option("--optimization-level", "0 to 5: how long to look for fast kernels. [3]", min=0, max=5),
]
TimingCacheDirectory = Annotated[
    Path | None,
    _option(
        "--timing-cache",
        "Folder for measured kernels, which make the next build quicker. [$STARKV_TIMING_CACHE, or among "
        "your caches]",
    ),
]
Plugin = Annotated[
    Path | None,
    _option("--plugin", "libstarkv_trt.so. [where `make plugin` builds it]"),
]
DebugLayers = Annotated[
    list[str] | None,
    _option(
        "--debug-layers",
        "Let tensors whose names fit this pattern be looked at while the engine runs, such as 'layers.0/*'; "
        "may be repeated. Slower.",
    ),
]


def parse_trt_options(given: dict[str, Any], compute_dtype: str | None) -> "TrtBuildOptions":
    """Check and convert what was given; the rest keeps its default.

    Args:
        given: option → value, as long as it was given.
        compute_dtype: shared with the other backend.

    Raises:
        UsageError: a value is wrong.
    """
    from starkv.export.build.trt_options import TrtBuildOptions
    from starkv.kv_packing.options import code_bits
    from starkv.trt_compat.version import parse_target

    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise UsageError(f"a TensorRT engine computes in {' or '.join(DTYPES)}, not in {compute_dtype}")
    level = given.get("--hardware-compatibility")
    if level is not None and level not in _LEVELS:
        raise UsageError(f"unknown --hardware-compatibility {level!r}; known: {', '.join(_LEVELS)}")
    fields = {
        "target": _applied(given, "--target-version", parse_target),
        "compute_dtype": DTYPES[compute_dtype] if compute_dtype is not None else None,
        "sessions": given.get("--sessions"),
        "prefill_rows": given.get("--prefill-rows"),
        "max_context": given.get("--max-context"),
        "max_pixels": given.get("--max-pixels"),
        "workspace": _applied(given, "--workspace", lambda gib: int(gib * GIB)),
        "optimization_level": given.get("--optimization-level"),
        "strip": given.get("--strip-weights"),
        "weight_streaming": given.get("--weight-streaming"),
        "hardware_compatibility": _LEVELS[level] if level is not None else None,
        "timing_directory": given.get("--timing-cache"),
        "plugins": given.get("--plugin"),
        "debug_layers": _applied(given, "--debug-layers", tuple),
        "kv_bits": _applied(given, "--kv-quant", code_bits),
    }
    return TrtBuildOptions(**{name: value for name, value in fields.items() if value is not None})


def _applied(given: dict[str, Any], name: str, convert: Any) -> Any:
    return convert(given[name]) if name in given else None
