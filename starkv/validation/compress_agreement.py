# SPDX-License-Identifier: Apache-2.0
"""Does a result of ``Compress`` agree with the PyTorch reference?

Two correct float32 programs sum in different orders, so among thousands of scores some are closer together
than their rounding. Three things hold nevertheless, and are what is checked:

- scores that come straight from attention agree to :data:`ROUNDING`;
- later scores agree to :data:`PRIOR` (a token whose score lies on the border of two of the 16 bins may fall
  to either side, which moves the spatial information by less than 4 ln(N) / N);
- rows, budgets and destination follow *exactly* from the implementation's own scores.

How many kept rows are the reference's is reported as ``kept_agreement``, and must be nearly all.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.methods.prefill import Prefill
from starkv.methods.select import Kept
from starkv.methods.star_kv import StarKVScores
from starkv.methods.star_kv_plan import StarKVPlan
from starkv.methods.star_kv_state import StarKVState

ROUNDING = 1e-5
PRIOR = 1e-2
LEAST_AGREEMENT = 0.99
BUDGET_ROWS = 1
"""Rows by which a layer's budget may differ: it is rounded from a number of float32."""
MOVED_TOKENS = 4
"""Tokens of a screenshot that may fall into another bin."""


@dataclass(frozen=True)
class Expected:
    """What the reference makes of a call, on the call's device."""

    kept: Kept
    scores: StarKVScores
    state: StarKVState


@dataclass(frozen=True)
class Agreement:
    """A comparison's outcome."""

    measures: dict[str, float]
    failures: tuple[str, ...]


def compare(call: CompressCall, source: Prefill, result: CompressResult, expected: Expected) -> Agreement:
    """Compare a result with the reference's.

    Args:
        call: after the call: its destination holds what was written.
        source: the cache before it.
        result: the implementation's outputs.
        expected: the reference's.
    """
    past = source.is_past
    boosted = _relative(result.stages[:, :, 1], expected.scores.groups.mean(2), past)
    attention = _relative(result.stages[:, :, 0], expected.scores.pooled.mean(2), past)
    final = _relative(result.scores, expected.scores.final, past)
    information = float((result.mi_ema - expected.state.mi_ema).abs().max())
    agreement = kept_agreement(result.rows, expected.kept.rows)
    budget = int((result.new_len.long() - expected.kept.kv_len).abs().max())
    measures = {
        "error": max(attention, boosted),
        "score_error": final,
        "kept_agreement": agreement,
    }
    failures = []
    if not max(attention, boosted) <= ROUNDING:
        failures.append(f"attention scores differ by {max(attention, boosted):.1e} of themselves")
    if not final <= PRIOR:
        failures.append(f"final scores differ by {final:.1e} of themselves")
    if not information <= _information_tolerance(call, source.frame.cells):
        failures.append(f"spatial information differs by {information:.1e} nats")
    if budget > BUDGET_ROWS:
        failures.append(f"a layer keeps {budget} rows more or fewer")
    if agreement < LEAST_AGREEMENT:
        failures.append(f"only {agreement:.1%} of the kept rows are the same")
    failures += own_selection_errors(call, source, result)
    return Agreement(measures, tuple(failures))


def own_selection_errors(call: CompressCall, source: Prefill, result: CompressResult) -> list[str]:
    """Where rows and destination do not follow exactly from the implementation's own scores and budgets."""
    priorities = source.priorities(result.scores[:, :, None])[:, :, 0]
    best = priorities.sort(dim=-1, descending=True, stable=True).indices
    failures = []
    lengths, slots = result.new_len.tolist(), call.slot.tolist()
    for layer, counts in enumerate(lengths):
        for sequence, count in enumerate(counts):
            place = f"layer {layer}, sequence {sequence}"
            wanted = best[layer, sequence, :count].sort().values
            rows = result.rows[layer, sequence, 0]
            if not torch.equal(rows[:count], wanted) or bool((rows[count:] != -1).any()):
                failures.append(f"{place}: rows are not the best of its own scores")
                continue
            slot = slots[sequence]
            moved = (
                (call.dst_k[layer, slot, :, :count], source.keys[layer, sequence][:, wanted]),
                (call.dst_v[layer, slot, :, :count], source.values[layer, sequence][:, wanted]),
                (call.dst_meta[layer, slot, :count], source.row_meta[layer, sequence, wanted]),
            )
            if not all(torch.equal(target, origin) for target, origin in moved):
                failures.append(f"{place}: the destination does not hold the kept rows")
    return failures


def kept_agreement(rows: Tensor, expected: Tensor) -> float:
    """Smallest share of a layer's kept rows that another result keeps as well.

    Args:
        rows: ``[L, B, 1, E]``, −1 behind the last.
        expected: ``[L, B, 1, K]``, likewise.
    """
    least = 1.0
    for own, other in zip(rows.flatten(0, 2), expected.flatten(0, 2), strict=True):
        own, other = own[own >= 0], other[other >= 0]
        both = int(torch.isin(own, other).sum())
        least = min(least, both / max(1, len(own), len(other)))
    return least


def _information_tolerance(call: CompressCall, cells: int) -> float:
    """What tokens on the border of two bins can change, in the units of the remembered average."""
    plan = StarKVPlan(*call.parameters.tolist())
    per_token = 4 * math.log(cells) / cells if cells > 1 else 0.0
    return 1e-5 + MOVED_TOKENS * per_token * plan.mi_scale


def _relative(actual: Tensor, expected: Tensor, where: Tensor) -> float:
    """Largest relative error; anything that is not a number counts as infinite."""
    error = (actual - expected).abs() / expected.abs().clamp(min=1e-12)
    return float(error[where].nan_to_num(nan=torch.inf).max())
