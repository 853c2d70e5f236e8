# SPDX-License-Identifier: Apache-2.0
"""``starkv inspect``: what is in an engine directory."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from starkv.cli.console import results
from starkv.cli.kv import KvBudget, KvCapacity, KvMethod, KvMode, kv_policy
from starkv.cli.options import Json, NoVerify
from starkv.errors import UsageError
from starkv.manifest import Manifest, read_manifest, verify_files
from starkv.methods.names import FULL

MIB = 2**20
_PROMPT, _BUDGET, _LONGEST = "Click the most important button.", 0.2, 64


def inspect(
    engine: Annotated[Path, typer.Argument(help="Engine directory.")],
    kept: Annotated[
        list[Path] | None,
        typer.Option(
            help="Show which tokens of this screenshot KV compression keeps; may be repeated, oldest first.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help=f'With --kept: instruction. "{_PROMPT}" by default.', show_default=False),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="With --kept: this layer alone, from 0.", show_default=False)
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="With --kept: this KV head alone, from 0.", show_default=False)
    ] = None,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay",
            help="With --kept: ask after each screenshot in turn, as an agent does; show the last.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="With --kept: longest reply, whose click is drawn. [64]", min=1, show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --kept: the picture. `kept.png` by default, none with --json.", show_default=False
        ),
    ] = None,
    kv_method: KvMethod = None,
    kv_budget: KvBudget = None,
    kv_capacity: KvCapacity = None,
    kv_mode: KvMode = "native",
    timings: Annotated[
        int | None,
        typer.Option(
            help="Of a TensorRT engine, on its machine: time each layer, over so many rounds.",
            min=1,
            show_default=False,
        ),
    ] = None,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Show what an engine directory holds, and whether its files are those that were built.

    With --kept: what KV compression keeps of a prompt with screenshots, as numbers and as a picture. A fifth
    of the rows where neither budget nor capacity is given.

    Example: [bold]starkv inspect engines/gui-tiny-ort-int8[/]

    Example: [bold]starkv inspect engines/gui-tiny-ort-int8 --kept examples/screen.png --kv-budget 0.4[/]
    """
    if kept:
        from starkv.cli.kept import Question, inspect_kept

        if kv_budget is None and kv_capacity is None and kv_method != FULL:
            kv_budget = _BUDGET
        policy = kv_policy(kv_method, kv_budget, kv_capacity, kv_mode)
        question = Question(kept, prompt or _PROMPT, policy, layer, head, replay, max_new_tokens or _LONGEST)
        picture = out or (None if json else Path("kept.png"))
        inspect_kept(engine, not no_verify, question, picture, json)
        return
    asked = (prompt, layer, head, max_new_tokens, out, kv_method, kv_budget, kv_capacity, replay or None)
    if any(option is not None for option in asked) or kv_mode != "native":
        raise UsageError("these options are about what compression keeps; add --kept SCREENSHOT")
    manifest = read_manifest(engine)
    if not no_verify:
        verify_files(engine, manifest)
    if manifest.tensorrt is not None:
        from starkv.cli.inspect_tensorrt import inspect_tensorrt

        inspect_tensorrt(engine, manifest, timings, as_json=json)
        if json:
            return
    elif timings:
        raise UsageError(f"{engine} is no TensorRT engine; --timings is about the layers of one")
    if json:
        results.print_json(manifest.model_dump_json())
        return
    results.print(_facts(manifest))
    results.print(_files(engine, manifest))
    results.print("hashes not checked" if no_verify else "all files have the hashes of the build")


def _facts(manifest: Manifest) -> Table:
    from starkv.runtime.engines.base import kv_bytes_per_row

    text, vision, image, quant = manifest.text, manifest.vision, manifest.image, manifest.quantization
    device = "processors" if manifest.compute_dtype == "float32" else "GPUs"
    rotary = f"M-RoPE {text.mrope_section}" if text.mrope_section else "1-D RoPE"
    block = f", blocks of {quant.block_size}" if quant.block_size else ""
    pixels = vision.patch_size * vision.spatial_merge_size
    attention = "full attention"
    if vision.window_size is not None:
        attention = f"window {vision.window_size} px, full attention in {vision.full_attention_blocks}"
    table = Table(
        title=Text(f"{manifest.name} ({manifest.family}) on {manifest.backend}"),
        show_header=False,
        title_justify="left",
    )
    for name, value in (
        (
            "source",
            f"{manifest.source}, {manifest.parameters / 1e6:.2f} M parameters, licence {manifest.licence}",
        ),
        (
            "weights",
            f"decoder {quant.decoder}, head {quant.head}, vision {quant.vision}, "
            f"embedding {quant.embedding}{block}",
        ),
        (
            "decoder",
            f"{text.layers} layers, hidden {text.hidden}, {text.heads} query and {text.kv_heads} KV heads "
            f"of {text.head_dim}",
        ),
        ("positions", f"{rotary}, theta {text.rope_theta:g}"),
        (
            "vision",
            f"{vision.depth} layers, hidden {vision.hidden}, {attention}",
        ),
        ("image", f"{image.min_pixels:,} to {image.max_pixels:,} pixels, one token per {pixels}x{pixels} px"),
        ("coordinates", f"{manifest.coordinates}, prompt dialect {manifest.prompt}"),
        ("computes in", f"{manifest.compute_dtype}, for {device}"),
        (
            "KV cache",
            f"{kv_bytes_per_row(manifest):,} bytes per token ({manifest.compute_dtype}), "
            f"up to {manifest.max_context:,} rows",
        ),
        *(
            [
                (
                    "packed cache",
                    f"{packing.describe()}: {packing.bytes_per_row:,} bytes per token, "
                    f"{kv_bytes_per_row(manifest) / packing.bytes_per_row:.1f} times fewer; "
                    + (
                        "trained"
                        if packing.trained
                        else f"calibrated on {packing.calibration_tokens:,} tokens"
                    ),
                )
            ]
            if (packing := manifest.kv_packing)
            else []
        ),
        ("built with", ", ".join(f"{tool} {version}" for tool, version in manifest.tool_versions.items())),
    ):
        table.add_row(name, Text(value))
    return table


def _files(engine: Path, manifest: Manifest) -> Table:
    table = Table("file", "MiB", "sha256")
    table.columns[1].justify = "right"
    for name, digest in manifest.files.items():
        path = engine / name
        size = f"{path.stat().st_size / MIB:.2f}" if path.is_file() else "missing"
        table.add_row(Text(name), size, digest[:16])
    return table
