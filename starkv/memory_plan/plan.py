# SPDX-License-Identifier: Apache-2.0
"""The plan: what the parts of an engine take, and which budgets and sessions fit which board."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from starkv.export.build.trt_options import position_rows
from starkv.export.build.trt_vision_bounds import most_sizes
from starkv.lowrank.quantized_rows import Bits
from starkv.manifest import ImageLimits, Manifest, Quantization, TensorRTBuild, TextShape, VisionShape
from starkv.memory_plan.buffers import compress_bytes, decode_bytes, prefill_bytes, vision_bytes
from starkv.memory_plan.codes import code_bytes, packing_bytes
from starkv.memory_plan.rows import cache_bytes, check_rows, kept_rows, slot_rows
from starkv.memory_plan.scratch import Limits, Scratch, estimate_scratch, measured_scratch
from starkv.memory_plan.weights import WeightBytes, weight_bytes
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.kv.buffers import round_up_rows

GIB = 2**30
CONTEXT_BYTES = GIB // 2
"""Assumed for what CUDA, its modules and TensorRT keep on the device; it depends on driver and card."""
SYSTEM_BYTES = 3 * GIB // 2
"""Assumed for the system and the process where GPU and processor share memory."""
USABLE = 0.93
"""Share of a board's nominal memory that is there: the rest goes to carve-outs and error correction."""
CARDS, SHARED_BOARDS = (8, 16, 24, 32, 64, 80), (8, 16, 32, 64)
"""Memory in GB of cards, and of boards whose GPU shares it with the processor (Jetson Orin)."""


@dataclass(frozen=True)
class PlannedModel:
    """What a plan needs to know of a model."""

    name: str
    text: TextShape
    vision: VisionShape
    image: ImageLimits
    quantization: Quantization
    observation_window: int
    max_context: int

    @classmethod
    def of(cls, manifest: Manifest) -> "PlannedModel":
        """The model of an engine."""
        return cls(*(getattr(manifest, name) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Scenario:
    """One KV budget and number of sessions."""

    budget: float
    sessions: int
    kept_rows: int
    """Most rows that a layer keeps of the prompt."""
    slot_rows: int
    """Capacity of a session's slot: those and the new tokens, rounded up."""
    slab: int
    """Bytes of a session's slot."""
    scratch: Scratch
    packing: int
    """Bytes of what codes need beside the slots: scales, tables, what stands for a cache that is not read."""
    staged: int
    """Bytes of chosen rows as floats, until they are codes; 0 where all rows are kept."""
    buffers: int
    """Bytes of inputs and outputs: of the decode step, and of the largest of the stages that come and go. A
    compression's include ``staged``."""
    total: int
    """Bytes of device memory."""
    host: int
    """Bytes that the process maps beside it."""

    @property
    def slabs(self) -> int:
        """Bytes of all sessions' slots."""
        return self.sessions * self.slab

    @property
    def smallest_card(self) -> int | None:
        """GB of the smallest card that it fits, or None."""
        return _smallest(CARDS, self.total)

    @property
    def smallest_shared_board(self) -> int | None:
        """GB of the smallest board with one memory for GPU and processor that it fits, or None."""
        return _smallest(SHARED_BOARDS, self.total + self.host + SYSTEM_BYTES)


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of an engine."""

    model: PlannedModel
    prompt_rows: int
    new_tokens: int
    prefill_rows: int
    weights: WeightBytes
    kv_bits: Bits | None
    """Of the codes that kept rows become; None where they stay as they are."""
    arena: int
    """Bytes of keys and values of one full prompt, shared by all sessions."""
    scenarios: tuple[Scenario, ...]


@dataclass(frozen=True)
class Wanted:
    """What an engine is planned for."""

    prompt_rows: int
    """Rows of the longest prompt."""
    new_tokens: int
    """Longest reply."""
    prefill_rows: int
    """Most rows of one prefill call."""
    budgets: tuple[float, ...]
    """Shares of a prompt's rows that are kept."""
    sessions: tuple[int, ...]
    """How many prompts are answered at once; the engine is built for so many."""
    kv_bits: Bits | None = None
    """Of the codes that kept rows become; None where they stay as they are."""


def plan_memory(model: PlannedModel, wanted: Wanted, built: TensorRTBuild | None = None) -> MemoryPlan:
    """Plan an engine's memory.

    Args:
        model: sizes and quantization.
        wanted: what it is to do.
        built: what its manifest says, after the build: TensorRT's own figures for activations.

    Raises:
        UsageError: prompt and reply exceed ``max_context``, or a budget is no share or too small.
    """
    check_rows(wanted.prompt_rows + wanted.new_tokens, model.max_context, model.name)
    weights = weight_bytes(model.text, model.vision, model.quantization)
    if built is not None:
        # A checkpoint that came quantized may have forms that no formula knows.
        vision, decoder = (built.weight_bytes[name] for name in ("vision", "decoder"))
        weights = replace(weights, vision=vision, layers=decoder - weights.head)
    arena = cache_bytes(model.text, 1, wanted.prompt_rows)
    scenarios = tuple(
        _scenario(model, wanted, budget, sessions, weights, arena, built)
        for budget in wanted.budgets
        for sessions in wanted.sessions
    )
    return MemoryPlan(
        model,
        wanted.prompt_rows,
        wanted.new_tokens,
        wanted.prefill_rows,
        weights,
        wanted.kv_bits,
        arena,
        scenarios,
    )


def _scenario(
    model: PlannedModel,
    wanted: Wanted,
    budget: float,
    sessions: int,
    weights: WeightBytes,
    arena: int,
    built: TensorRTBuild | None,
) -> Scenario:
    text, window, bits = model.text, model.observation_window, wanted.kv_bits
    kept = kept_rows(wanted.prompt_rows, budget, window)
    cache_rows = round_up_rows(model.max_context)
    positions = built.position_rows if built else position_rows(cache_rows)
    slot = slot_rows(kept + wanted.new_tokens, cache_rows)
    image = most_sizes(model.image, model.vision)
    limits = Limits(wanted.prefill_rows, cache_rows, sessions, window, image, bits, positions)
    scratch = (
        measured_scratch(built) if built else estimate_scratch(text, model.vision, limits, weights.largest)
    )
    if bits is None:
        slab, packing, staged = cache_bytes(text, 1, slot), 0, 0
        compression = _compression(model, wanted, sessions, slot)
    else:
        slab = code_bytes(text, 1, slot, bits)
        packing = packing_bytes(text, built.sessions if built else sessions, bits, positions)
        # A whole budget is the method that keeps all: its rows become codes where they are, in no more memory
        # than their prefill took.
        staged = cache_bytes(text, 1, kept) if budget < 1 else 0
        compression = staged + _compression(model, wanted, 1, round_up_rows(kept)) if staged else 0
    stages = (
        vision_bytes(model.vision, text.hidden, image),
        prefill_bytes(text, window, wanted.prompt_rows, wanted.prefill_rows),
        compression,
    )
    buffers = decode_bytes(text, sessions) + max(stages)
    parts = weights.device, scratch.shared, arena, sessions * slab, packing, buffers, CONTEXT_BYTES
    return Scenario(
        budget=budget,
        sessions=sessions,
        kept_rows=kept,
        slot_rows=slot,
        slab=slab,
        scratch=scratch,
        packing=packing,
        staged=staged,
        buffers=buffers,
        total=sum(parts),
        host=weights.embedding,
    )


def _compression(model: PlannedModel, wanted: Wanted, slots: int, slot_rows: int) -> int:
    """Bytes of a compression's inputs and outputs, into one of so many slots of floats."""
    windows = min(model.observation_window, wanted.prompt_rows), StarKVConfig().window
    cells = most_sizes(model.image, model.vision).tokens
    return compress_bytes(model.text, windows, round_up_rows(wanted.prompt_rows), slots, slot_rows, cells)


def _smallest(boards: Sequence[int], needed: int) -> int | None:
    return next((board for board in boards if needed <= board * GIB * USABLE), None)
