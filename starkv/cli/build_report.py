# SPDX-License-Identifier: Apache-2.0
"""What ``starkv build --dry-run`` prints: the plan of a TensorRT engine as tables or JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from starkv.cli.console import results
from starkv.kv_packing.quantized import code_bytes_per_row

if TYPE_CHECKING:
    from starkv.export.build.trt_plan import BuildPlan
    from starkv.export.build.trt_profiles import Sizes

_MIB = 2**20
_WORDS = {
    "vision": {"N": "patches", "M": "slots of windows", "nW": "windows", "T": "image tokens"},
    "decoder": {
        "B": "sessions",
        "S": "tokens",
        "C": "cache rows",
        "K": "rows of codes",
        "P": "positions",
    },
    "compress": {
        "C": "rows",
        "E": "rows of a slot",
        "S": "slots",
        "W": "rows that look",
        "V": "tokens of a screenshot",
    },
}
"""Graph → symbol of its inputs → what that counts."""


def plan_as_json(plan: "BuildPlan") -> dict[str, Any]:
    """The plan, with all shapes and command lines."""
    from starkv.export.build.trt_commands import trtexec_command

    return {
        "model": plan.record.name,
        "quantization": plan.record.quantization.model_dump(),
        "target": str(plan.target),
        "compute_dtype": plan.compute_dtype,
        **_limits(plan),
        "weight_bytes": plan.weight_bytes,
        "kv_bytes_per_row": plan.row_bytes,
        "kv_bits": plan.options.kv_bits,
        "expanded_weights": plan.expanded,
        "plans": [
            {
                "name": engine.plan_name,
                "graph_sha256": engine.graph.sha256,
                "weight_bytes": engine.graph.weight_bytes,
                "settings": asdict(engine.settings),
                "profiles": [
                    {name: asdict(shape) for name, shape in profile.items()} for profile in engine.profiles
                ],
                "trtexec": trtexec_command(engine, plan.options.plugins),
            }
            for engine in plan.engines
        ],
    }


def print_plan(plan: "BuildPlan") -> None:
    """The plan as tables on stdout."""
    options = plan.options
    results.print(
        f"{plan.record.name} ({plan.record.quantization.preset}) for TensorRT {plan.target} in "
        f"{plan.compute_dtype}, {'without' if options.strip else 'with'} weights in its plans"
    )
    sizes = Table("plan", "weights", "inputs from least (usual) to most", box=None)
    for engine in plan.engines:
        weights = f"{engine.graph.weight_bytes / _MIB:,.0f} MiB"
        for index, profile in enumerate(engine.sizes):
            first = ("", "") if index else (engine.plan_name, weights)
            sizes.add_row(*first, _in_words(engine.graph.name, profile))
    results.print(sizes)
    limits = _limits(plan)
    cache = plan.row_bytes * plan.cache_rows
    results.print(
        f"up to {limits['sessions']} sessions of {limits['cache_rows']:,} tokens, "
        f"{limits['prefill_rows']:,} per prefill call, images of {limits['image_patches']:,} patches"
    )
    results.print(
        f"weights {plan.weight_bytes / _MIB:,.0f} MiB; KV cache {plan.row_bytes:,} bytes per token, "
        f"{cache / _MIB:,.0f} MiB for the longest session"
    )
    if bits := options.kv_bits:
        packed = code_bytes_per_row(plan.record.text, bits)
        results.print(
            f"kept rows as int{bits}, {packed:,} bytes per token with its positions, in up to "
            f"{plan.position_rows:,} positions"
        )
    if plan.expanded:
        results.print(
            f"{plan.expanded} quantized weights become 16-bit numbers: TensorRT can't take their form"
        )
    results.print("every graph keeps the rules of that TensorRT's parser; nothing was built")


def _limits(plan: "BuildPlan") -> dict[str, int]:
    return {
        "sessions": plan.options.sessions,
        "prefill_rows": plan.options.prefill_rows,
        "cache_rows": plan.cache_rows,
        "image_patches": plan.image_patches,
    }


def _in_words(graph: str, sizes: "Sizes") -> str:
    """Sizes of a profile that are not fixed."""
    words = _WORDS[graph]
    ranges = [
        f"{words.get(symbol, symbol)} {size.least:,} ({size.usual:,}) {size.most:,}"
        for symbol, size in sizes.items()
        if size.least != size.most
    ]
    return ", ".join(ranges)
