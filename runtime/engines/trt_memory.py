# SPDX-License-Identifier: Apache-2.0
"""Whether a card has room for an engine, before TensorRT or a large allocation fails."""

from collections.abc import Mapping

from starkv.errors import EngineError
from starkv.manifest import Manifest, TensorRTBuild
from starkv.runtime.engines.base import kv_bytes_per_row
from starkv.runtime.engines.cuda import Cuda
from starkv.trt_compat.running import Plan

_MIB = 1 << 20
_LEAST_ROWS = 1024
"""Rows of a short prompt: below that an engine is of no use."""


def largest_scratch(plans: Mapping[str, Plan]) -> int:
    """Bytes for activations: one plan runs at a time."""
    return max(plan.scratch_bytes(profile) for plan in plans.values() for profile in range(plan.profiles))


def check_memory(manifest: Manifest, build: TensorRTBuild, cuda: Cuda, weight_budget: int | None) -> None:
    """Refuse to begin what can't end well.

    Args:
        manifest: the engine's.
        build: what it says of TensorRT.
        cuda: the card.
        weight_budget: bytes of weights that an engine which streams them puts on the card; as many as fit if
            None.

    Raises:
        EngineError: says how much is needed, how much there is, and what lowers it.
    """
    free, total = cuda.memory()
    weights = sum(build.weight_bytes.values())
    if build.weight_streaming:
        weights = min(weights, weight_budget or 0)
    scratch = max(build.scratch_bytes.values(), default=0)
    cache = 2 * min(_LEAST_ROWS, manifest.max_context) * kv_bytes_per_row(manifest)
    needed = weights + scratch + cache
    if needed > free:
        raise EngineError(
            f"{manifest.name} needs {needed / _MIB:.0f} MiB of device memory for a short prompt "
            f"({weights / _MIB:.0f} for weights, {scratch / _MIB:.0f} for activations, "
            f"{cache / _MIB:.0f} for caches), and {free / _MIB:.0f} of {total / _MIB:.0f} MiB are free; "
            "free some, or build the engine with smaller --max-pixels, --prefill-rows or --sessions, or with "
            "--weight-streaming"
        )
