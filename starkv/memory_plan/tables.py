# SPDX-License-Identifier: Apache-2.0
"""A memory plan as Markdown tables and as JSON."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from starkv.memory_plan.plan import CONTEXT_BYTES, SYSTEM_BYTES, USABLE, MemoryPlan, Scenario
from starkv.validation.report import markdown_table

_MIB, _GIB = 2**20, 2**30
_STAGES = ("vision", "prefill", "decode", "compress")
_HEADER = (
    "KV budget",
    "sessions",
    "rows of a slot",
    "a slot, MiB",
    "all slots, GiB",
    "in all, GiB",
    "fits a card of",
    "fits a shared memory of",
)


def plan_tables(plan: MemoryPlan) -> str:
    """The plan as Markdown."""
    return "\n\n".join(_paragraphs(plan))


def plan_json(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as JSON values; sizes in bytes."""
    model = plan.model
    return {
        "model": model.name,
        "quantization": model.quantization.preset,
        "prompt_rows": plan.prompt_rows,
        "new_tokens": plan.new_tokens,
        "prefill_rows": plan.prefill_rows,
        "max_pixels": model.image.max_pixels,
        "max_context": model.max_context,
        "kv_quant": _kept_as(plan) or "none",
        "weights": {**asdict(plan.weights), "device": plan.weights.device},
        "files": _files(plan),
        "arena": plan.arena,
        "context": CONTEXT_BYTES,
        "scenarios": [
            {
                **asdict(scenario),
                "scratch": {**asdict(scenario.scratch), "shared": scenario.scratch.shared},
                "slabs": scenario.slabs,
                "smallest_card_gb": scenario.smallest_card,
                "smallest_shared_board_gb": scenario.smallest_shared_board,
            }
            for scenario in plan.scenarios
        ],
    }


def _paragraphs(plan: MemoryPlan) -> Iterator[str]:
    model = plan.model
    yield (
        f"{model.name} in {model.quantization.preset}: prompts of {plan.prompt_rows:,} rows, replies of up "
        f"to {plan.new_tokens}, prefill calls of up to {plan.prefill_rows:,}, images of up to "
        f"{model.image.max_pixels / 1e6:.1f} million pixels, sequences of up to {model.max_context:,} rows; "
        f"kept rows are {_kept_as(plan) or '16-bit floats'}."
    )
    yield markdown_table(("part", "MiB", "how it is known"), list(_parts(plan)))
    yield markdown_table(("file", "GiB"), [(name, _gib(size)) for name, size in _files(plan).items()])
    yield markdown_table(_HEADER, [_row(scenario) for scenario in plan.scenarios])
    yield (
        f"Of a card's memory {USABLE:.0%} are counted on. Where processor and GPU share it (Jetson), "
        f"{SYSTEM_BYTES / _GIB:g} GiB for system and process and the embedding come on top."
    )


def _parts(plan: MemoryPlan) -> Iterator[tuple[str, str, str]]:
    weights, scenarios = plan.weights, plan.scenarios
    yield "weights of the vision tower", _mib(weights.vision), "exact"
    yield "weights of the decoder's layers", _mib(weights.layers), "exact"
    yield "weights of the head", _mib(weights.head), "exact"
    source = "TensorRT's figure" if scenarios[0].scratch.measured else "bound"
    for stage in _STAGES:
        yield f"scratch of {stage}", _range(getattr(each.scratch, stage) for each in scenarios), source
    yield "scratch that all share", _range(each.scratch.shared for each in scenarios), "the largest of these"
    yield "arena: one prompt's keys and values", _mib(plan.arena), "exact"
    if plan.kv_bits is not None:
        yield (
            "codes' scales, rotary tables and stand-ins",
            _range(each.packing for each in scenarios),
            "exact",
        )
        yield (
            "chosen rows as floats, until they are codes",
            _range(each.staged for each in scenarios),
            "exact",
        )
    beside = "" if plan.kv_bits is None else ", chosen rows among them"
    yield f"inputs and outputs{beside}", _range(each.buffers for each in scenarios), "exact"
    yield "CUDA's context and TensorRT", _mib(CONTEXT_BYTES), "assumed"
    yield "embedding, in host memory", _mib(weights.embedding), "exact"


def _files(plan: MemoryPlan) -> dict[str, int]:
    """File of the engine → bytes, of plans those of their weights."""
    weights = plan.weights
    return {
        "vision.plan": weights.vision,
        "decoder.plan": weights.decoder,
        "embedding.safetensors": weights.embedding,
    }


def _row(scenario: Scenario) -> tuple[str, ...]:
    return (
        f"{scenario.budget:.0%}",
        str(scenario.sessions),
        f"{scenario.slot_rows:,}",
        _mib(scenario.slab),
        _gib(scenario.slabs),
        _gib(scenario.total),
        _board(scenario.smallest_card),
        _board(scenario.smallest_shared_board),
    )


def _kept_as(plan: MemoryPlan) -> str | None:
    """The quantization of kept rows; None where they stay floats."""
    return None if plan.kv_bits is None else f"int{plan.kv_bits}"


def _board(gigabytes: int | None) -> str:
    return "none" if gigabytes is None else f"{gigabytes} GB"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f}"


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}"


def _range(sizes: Iterable[int]) -> str:
    """One size, or the smallest and the largest where they depend on the sessions."""
    found = list(sizes)
    least, most = _mib(min(found)), _mib(max(found))
    return least if least == most else f"{least} to {most}"
