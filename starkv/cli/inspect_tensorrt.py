# SPDX-License-Identifier: Apache-2.0
"""``starkv inspect`` of a TensorRT engine: its manifest, and its plans where they can be opened."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from starkv.errors import StarkvError
from starkv.manifest import Manifest, TensorRTBuild
from starkv.runtime.engines.base import Rope
from starkv.runtime.engines.trt import TrtEngine
from starkv.runtime.preprocess.image import ImageInputs
from starkv.runtime.preprocess.positions import rope_tables, text_positions

_MIB = 1 << 20
_ROWS, _GRID = 512, (16, 16)
"""Prompt and image whose layers are timed."""
_SHOWN = 12


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


def open_here(directory: Path) -> TrtEngine | str:
    """The engine, or why it can't be opened on this machine."""
    try:
        return TrtEngine(directory, verify=False)
    except StarkvError as error:
        return str(error)


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
    title = f"{plan.name}.plan, {plan.layers} layers after fusion"
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


def _shape(sizes: list[int]) -> str:
    return "x".join("?" if size < 0 else str(size) for size in sizes)


def layer_timings(engine: TrtEngine, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each layer, the mean of some rounds: an image, a prefill of 512 rows, decode steps.

    Args:
        engine: opened.
        rounds: how many.
    """
    text = engine.manifest.text
    rows = min(_ROWS, engine.manifest.max_context - rounds - 1)
    embeds = np.zeros((rows, text.hidden), np.float32)
    run = _round(engine, embeds, Rope(*rope_tables(text_positions(rows).values, text)))
    # The first round chooses kernels' workspaces and is none of those that count.
    run()
    with engine.timed_layers() as times:
        for _ in range(rounds):
            run()
    return {part: {name: ms / rounds for name, ms in layers.items()} for part, layers in times.items()}


def _round(engine: TrtEngine, embeds: np.ndarray[Any, Any], rope: Rope) -> Callable[[], None]:
    text, vision = engine.manifest.text, engine.manifest.vision
    merge = vision.spatial_merge_size
    rows, columns = _GRID
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = np.zeros((rows * columns, values), np.float32)
    side = vision.patch_size
    image = ImageInputs(
        pixels, rows, columns, (rows // merge, columns // merge), rows * side, columns * side, 1, 1
    )
    one = Rope(*rope_tables(text_positions(1, len(embeds)).values, text))

    def run() -> None:
        engine.encode_image(image)
        arena = engine.new_arena(len(embeds))
        engine.prefill(arena, embeds, rope)
        pool = engine.new_pool(1, 64)
        pool.acquire()
        engine.decode(pool, embeds[:1], one)

    return run


def timing_table(part: str, layers: dict[str, float]) -> Table:
    """The slowest layers of a plan."""
    total = sum(layers.values())
    title = f"{part}: {total:.2f} ms in {len(layers)} layers"
    table = Table("layer", "ms", "%", title=Text(title), title_justify="left")
    for name, ms in sorted(layers.items(), key=lambda entry: -entry[1])[:_SHOWN]:
        table.add_row(Text(name), f"{ms:.3f}", f"{ms / total:.0%}" if total else "")
    return table


def as_json(
    manifest: Manifest, plans: list[PlanRows], timings: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Everything for a script: the manifest's fields, and what the plans said."""
    return {
        **manifest.model_dump(),
        "plans": [asdict(plan) for plan in plans],
        "layer_milliseconds": timings,
    }
