# SPDX-License-Identifier: Apache-2.0
"""``starkv build``: portable ONNX, or a model, → engine directory."""

import json as json_module
from typing import Annotated

import typer

from starkv.cli import trt_options as trt
from starkv.cli.backends import choose_backend
from starkv.cli.console import note
from starkv.cli.engines import build_engine, settle_dtype
from starkv.cli.kv import KvQuant, KvRank, packing_options
from starkv.cli.options import (
    Calibration,
    Checkpoint,
    Json,
    Layers,
    Output,
    Quantization,
    RandomDtype,
    RandomWeights,
)
from starkv.cli.sources import SourceOptions
from starkv.errors import UsageError


def build(
    model: Annotated[
        str, typer.Argument(help="Model card's name, Hugging Face folder, or a folder of `export`.")
    ],
    out: Output = None,
    quant: Quantization = None,
    backend: Annotated[
        str,
        typer.Option(
            help="ort: ONNX Runtime. trt: TensorRT. auto: trt where TensorRT, a GPU and the plugins are here."
        ),
    ] = "auto",
    prepack: Annotated[
        bool,
        typer.Option(
            "--prepack", help="Also store the graphs compiled for this processor: loads faster here."
        ),
    ] = False,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    random_dtype: RandomDtype = None,
    layers: Layers = None,
    calibration: Calibration = None,
    kv_quant: KvQuant = None,
    kv_rank: KvRank = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Of ONNX Runtime: cpu, or cuda for an NVIDIA GPU. [cpu]",
            show_default=False,
        ),
    ] = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            help="For GPUs: bfloat16 or float16, in which Qwen2.5-VL may overflow. [bfloat16]",
            show_default=False,
        ),
    ] = None,
    target_version: trt.TargetVersion = None,
    dry_run: trt.DryRun = False,
    sessions: trt.Sessions = None,
    prefill_rows: trt.PrefillRows = None,
    max_context: trt.MaxContext = None,
    max_pixels: trt.MaxPixels = None,
    strip_weights: trt.StripWeights = False,
    weight_streaming: trt.WeightStreaming = False,
    hardware_compatibility: trt.HardwareLevel = None,
    workspace: trt.Workspace = None,
    optimization_level: trt.OptimizationLevel = None,
    timing_cache: trt.TimingCacheDirectory = None,
    plugin: trt.Plugin = None,
    debug_layers: trt.DebugLayers = None,
    json: Json = False,
) -> None:
    """Build an engine directory that `run`, `bench` and other machines can load.

    Example: [bold]starkv build gui-tiny --quant int4[/]

    Example: [bold]starkv build gui-tiny --kv-quant int8[/] for a KV cache of a quarter

    Example: [bold]starkv build ui-tars-1.5-7b --random-weights[/] to see what the real size costs here

    Example: [bold]starkv build gui-tiny --backend trt --target-version 10.3 --dry-run[/]
    """
    sources = SourceOptions(checkpoint, random_weights, random_dtype, layers, calibration)
    packing = packing_options(kv_quant, kv_rank)
    for_ort = _given({"--prepack": prepack, "--device": device, "--kv-rank": kv_rank})
    for_trt = _given(
        {
            "--dry-run": dry_run,
            "--target-version": target_version,
            "--sessions": sessions,
            "--prefill-rows": prefill_rows,
            "--max-context": max_context,
            "--max-pixels": max_pixels,
            "--strip-weights": strip_weights,
            "--weight-streaming": weight_streaming,
            "--hardware-compatibility": hardware_compatibility,
            "--workspace": workspace,
            "--optimization-level": optimization_level,
            "--timing-cache": timing_cache,
            "--plugin": plugin,
            "--debug-layers": debug_layers,
        }
    )
    if json and not dry_run:
        raise UsageError("--json is about the plan that --dry-run makes; add it, or leave --json out")
    # A dtype that TensorRT lacks may be meant for ONNX Runtime.
    options = trt.parse_trt_options(for_trt, compute_dtype if compute_dtype in trt.DTYPES else None)
    chosen, reason = choose_backend(backend, tuple(for_ort), tuple(for_trt), options)
    note(f"backend {chosen}: {reason}")
    if chosen == "ort":
        dtype = settle_dtype(device or "cpu", compute_dtype)
        print(build_engine(model, quant, out, prepack, sources, dtype, packing)[0])
        return
    if kv_quant is not None:
        for_trt["--kv-quant"] = kv_quant
    options = trt.parse_trt_options(for_trt, compute_dtype)
    from starkv.cli.build_report import plan_as_json, print_plan
    from starkv.cli.trt_build import build_trt, plan_build

    if not dry_run:
        print(build_trt(model, quant, out, sources, options))
        return
    plan = plan_build(model, quant, out, sources, options)
    if json:
        print(json_module.dumps(plan_as_json(plan)))
    else:
        print_plan(plan)


def _given(options: dict[str, object]) -> dict[str, object]:
    """Those that the user named."""
    # 0 is a value like any other.
    return {name: value for name, value in options.items() if value is not None and value is not False}
