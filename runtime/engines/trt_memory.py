# SPDX-License-Identifier: Apache-2.0
"""Whether a card has room for an engine, before TensorRT or a large allocation fails, and what would help."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starkv.errors import EngineError, UsageError
from starkv.kv_packing.quantized import code_bytes_per_row
from starkv.manifest import Manifest, TensorRTBuild
from starkv.runtime.engines.base import kv_bytes_per_row
from starkv.runtime.engines.cuda import Cuda
from starkv.trt_compat.running import Plan

WEIGHTS_VARIABLE = "STARKV_WEIGHTS_MIB"
"""MiB of weights on the card, of an engine that streams them; as many as fit where it is not set."""
_MIB = 1 << 20
_LEAST_ROWS = 1024
"""Rows of a short prompt: below that an engine is of no use."""


def largest_scratch(plans: Mapping[str, Plan]) -> int:
    """Bytes for activations: one plan runs at a time."""
    return max(plan.scratch_bytes(profile) for plan in plans.values() for profile in range(plan.profiles))


def budget_of_environment() -> int | None:
    """Bytes that the environment allows for weights, or None.

    Raises:
        UsageError: that is no number.
    """
    text = os.environ.get(WEIGHTS_VARIABLE, "")
    if not text:
        return None
    if not text.isdecimal():
        raise UsageError(f"{WEIGHTS_VARIABLE} is {text!r}; write a number of MiB, such as 2048")
    return int(text) * _MIB


def check_memory(manifest: Manifest, build: TensorRTBuild, cuda: Cuda, weight_budget: int | None) -> int:
    """Refuse to begin what can't end well.

    Args:
        manifest: the engine's.
        build: what it says of TensorRT.
        cuda: the card.
        weight_budget: bytes of weights that an engine which streams them puts on the card; as many as leave
            room for the longest prompt if None.

    Returns:
        bytes of weights that belong on the card.

    Raises:
        EngineError: says how much is needed, how much there is, and what lowers it.
    """
    free, total = cuda.memory()
    weights = sum(build.weight_bytes.values())
    scratch = max(build.scratch_bytes.values(), default=0)
    # A prompt and what is kept of it lie on the card at the same time.
    row = 2 * kv_bytes_per_row(manifest)
    if build.kv_bits is not None:
        # As floats first, then also as codes.
        row += code_bytes_per_row(manifest.text, build.kv_bits)
    if build.weight_streaming:
        room = free - scratch - manifest.max_context * row
        weights = min(weights, max(0, room) if weight_budget is None else weight_budget)
    cache = min(_LEAST_ROWS, manifest.max_context) * row
    needed = weights + scratch + cache
    if needed > free:
        raise EngineError(
            f"{manifest.name} needs {needed / _MIB:.0f} MiB of device memory for a short prompt "
            f"({weights / _MIB:.0f} for weights, {scratch / _MIB:.0f} for activations, "
            f"{cache / _MIB:.0f} for caches), and {free / _MIB:.0f} of {total / _MIB:.0f} MiB are free; "
            f"free some, or {_smaller_engine(build)}"
        )
    return weights


def _smaller_engine(build: TensorRTBuild) -> str:
    smaller = "build the engine with smaller --max-pixels, --prefill-rows or --sessions"
    if build.weight_streaming:
        return f"{smaller}, or set {WEIGHTS_VARIABLE} lower"
    return f"{smaller}, or with --weight-streaming"


@contextmanager
def room_for(what: str, size: int, remedy: str) -> Iterator[None]:
    """Say what memory was for where there is none.

    Args:
        what: is allocated in the block.
        size: of all of it, in bytes.
        remedy: what takes less.
    """
    try:
        yield
    except EngineError as error:
        raise EngineError(f"no room for {what}, {size / _MIB:.0f} MiB: {error}; {remedy}") from None
