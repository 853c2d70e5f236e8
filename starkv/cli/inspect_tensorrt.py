# SPDX-License-Identifier: Apache-2.0
"""``starkv inspect`` of a TensorRT engine: its manifest, and its plans where they can be opened."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from starkv.cli.console import note, results
from starkv.cli.layer_timings import layer_timings
from starkv.errors import EngineError, StarkvError
from starkv.manifest import Manifest, TensorRTBuild
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.preprocess.tokenizer import ChatTokenizer

_MIB = 1 << 20
_SHOWN = 12
"""Layers of a plan whose times are printed, the slowest ones."""


@dataclass(frozen=True)
class TensorRow:
    """An input or output of a plan."""

    name: str
    is_input: bool
    dtype: str
    shape: list[int]
    ranges: list[list[list[int]]]
    """Least, usual and greatest shape in each profile."""


@dataclass(frozen=True)
class PlanRows:
    """One plan."""

    name: str
    layers: int
    tensors: list[TensorRow]


def inspect_tensorrt(directory: Path, manifest: Manifest, rounds: int | None, as_json: bool) -> None:
    """Print what the manifest says of an engine, and its plans where this machine opens them.

    Args:
        directory: the engine.
        manifest: its own.
        rounds: how often to time the layers; not at all if None.
        as_json: as JSON, with all fields of the manifest.

    Raises:
        EngineError: the layers are to be timed, and the plans can't be opened here.
    """
    plans, times, reason = [], {}, ""
    try:
        engine = TrtEngine(directory, verify=False)
    except StarkvError as error:
        if rounds:
            raise EngineError(f"the layers can't be timed here: {error}") from None
        reason = str(error)
    else:
        plans = plan_rows(engine)
        times = layer_timings(engine, ChatTokenizer.from_directory(directory), rounds) if rounds else {}
    if as_json:
        shown = [asdict(plan) for plan in plans]
        print(json.dumps({**manifest.model_dump(), "plans": shown, "layer_milliseconds": times}))
        return
    if manifest.tensorrt is not None:
        results.print(build_table(manifest.tensorrt))
    for plan in plans:
        results.print(plan_table(plan))
    for part, layers in times.items():
        results.print(timing_table(part, layers))
    if reason:
        note(f"the plans can't be opened here: {reason}")


def build_table(build: TensorRTBuild) -> Table:
    """What the manifest says."""
    table = Table(title=Text("TensorRT"), show_header=False, title_justify="left")
    version = f"TensorRT {build.version}, CUDA {build.cuda}"
    where = f"{build.gpu}, compute capability {build.compute_capability}, hardware compatibility "
    weights = ", ".join(f"{name} {size / _MIB:,.1f}" for name, size in build.weight_bytes.items())
    scratch = ", ".join(f"{name} {size / _MIB:,.1f}" for name, size in build.scratch_bytes.items())
    form = "in the graphs beside the plans" if build.stripped else "in the plans"
    streamed = ", streamed from host memory" if build.weight_streaming else ""
    for name, value in (
        ("built with", version),
        ("runs on", where + build.hardware_compatibility),
        (
            "sizes",
            f"{build.prefill_rows:,} rows a prefill call, {build.sessions} sessions, caches of "
            f"{build.cache_rows:,} rows, images of {build.image_patches:,} patches",
        ),
        ("weights, MiB", f"{weights}; {form}{streamed}"),
        ("scratch, MiB", f"{scratch}; the largest serves all"),
        ("graphs", ", ".join(f"{name} {digest[:12]}" for name, digest in build.graphs.items())),
    ):
        table.add_row(name, Text(value))
    return table


def plan_rows(engine: TrtEngine) -> list[PlanRows]:
    """What the plans say."""
    from starkv.trt_compat.inspecting import plan_layers

    found = []
    for name, plan in engine.plans.items():
        tensors = [
            TensorRow(
                info.name,
                info.is_input,
                str(info.dtype),
                list(info.shape),
                [[list(shape) for shape in ranges] for ranges in info.ranges],
            )
            for info in plan.tensors.values()
        ]
        found.append(PlanRows(name, len(plan_layers(plan)), tensors))
    return found


def plan_table(plan: PlanRows) -> Table:
    """Inputs and outputs of a plan; the many caches of a decoder as one."""
    title = f"{plan.name}.plan, {_layers(plan.layers)} after fusion"
    table = Table(
        "tensor",
        "",
        "type",
        "shape",
        "profiles: least / usual / most",
        title=Text(title),
        title_justify="left",
    )
    for tensor in plan.tensors:
        stem, dot, number = tensor.name.partition(".")
        if dot and number != "0":
            continue
        name = f"{stem}.i" if dot else tensor.name
        ranges = "; ".join(" / ".join(_shape(shape) for shape in profile) for profile in tensor.ranges)
        table.add_row(name, "in" if tensor.is_input else "out", tensor.dtype, _shape(tensor.shape), ranges)
    return table


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _shape(sizes: list[int]) -> str:
    return "x".join("?" if size < 0 else str(size) for size in sizes)


def timing_table(part: str, layers: dict[str, float]) -> Table:
    """The slowest layers of a plan."""
    total = sum(layers.values())
    title = f"{part}: {total:.2f} ms in {_layers(len(layers))}"
    table = Table("layer", "ms", "%", title=Text(title), title_justify="left")
    for name, ms in sorted(layers.items(), key=lambda entry: -entry[1])[:_SHOWN]:
        table.add_row(Text(name), f"{ms:.3f}", f"{ms / total:.0%}" if total else "")
    return table
