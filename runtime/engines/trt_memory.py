# SPDX-License-Identifier: Apache-2.0
"""Whether a card has room for an engine, before a large allocation fails."""

from collections.abc import Mapping

from starkv.errors import EngineError
from starkv.manifest import Manifest
from starkv.runtime.engines.base import kv_bytes_per_row
from starkv.runtime.engines.cuda import Cuda
from starkv.trt_compat.running import Plan

_MIB = 1 << 20
_LEAST_ROWS = 1024
"""Rows of a short prompt: below that an engine is of no use."""


def largest_scratch(plans: Mapping[str, Plan]) -> int:
    """Bytes for activations: one plan runs at a time."""
    return max(plan.scratch_bytes(profile) for plan in plans.values() for profile in range(plan.profiles))


def check_memory(manifest: Manifest, plans: Mapping[str, Plan], cuda: Cuda) -> None:
    """Refuse to begin what can't end well. Weights are on the card by now.

    Raises:
        EngineError: says how much is needed, how much there is, and what lowers it.
    """
    free, total = cuda.memory()
    scratch = largest_scratch(plans)
    cache = 2 * min(_LEAST_ROWS, manifest.max_context) * kv_bytes_per_row(manifest)
    if scratch + cache > free:
        raise EngineError(
            f"the GPU has {free / _MIB:.0f} of {total / _MIB:.0f} MiB free beside the weights, but "
            f"{manifest.name} needs {scratch / _MIB:.0f} MiB for activations and {cache / _MIB:.0f} MiB for "
            "the caches of a short prompt; free some, or build the engine with smaller --prefill-rows, "
            "--sessions or --max-pixels, or with --weight-streaming"
        )
