# SPDX-License-Identifier: Apache-2.0
"""When does a packed cache change too much? Verdicts on eviction, quantized rows and low rank, combined.

What is judged is packing: a combination is compared with the same one without it, so that a loss which
eviction causes is not counted against it. Bounds stand in a check's measures as ``tolerance_…``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from starkv.validation.clicks import FEWEST_RIGHT
from starkv.validation.quant import MOST_LOST, SIGNIFICANCE, sign_test
from starkv.validation.report import Check

MOST_KL = 0.01
"""Largest mean divergence in nats that packing may add; docs/validation.md says why."""


def divergence_measures(divergences: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """``kl_mean`` and ``kl_p95`` over all tokens; nothing where no reply has a second token.

    Args:
        divergences: of each question's tokens behind the first, in nats.
    """
    every = np.concatenate([*divergences, np.zeros(0)])
    if not every.size:
        return {}
    return {"kl_mean": float(every.mean()), "kl_p95": float(np.quantile(every, 0.95))}


def judge_packing(check: Check, measures: Mapping[str, float], unpacked: Mapping[str, float]) -> Check:
    """A packed cache against the same rows as floats.

    It fails where right clicks are lost, net of those won, on more than ``MOST_LOST`` of the questions and
    more than chance explains; where the mean divergence grows by more than ``MOST_KL``; and where no fewer
    bytes are held. Skipped where the float cache has too few right answers to tell a loss and nothing else
    fails.

    Args:
        check: blank; its reference names the float cache.
        measures: of the packed cache: ``samples``, ``kv_bytes``, maybe ``kl_mean``, and ``packing_lost``,
            ``packing_won`` and ``unpacked_right``, clicks in comparison with the float cache.
        unpacked: of the float cache.
    """
    found = {**measures, "tolerance_lost": MOST_LOST, "tolerance_kl": MOST_KL}
    lost, won, count = (int(measures[name]) for name in ("packing_lost", "packing_won", "samples"))
    failures = []
    if lost - won > MOST_LOST * count and sign_test(lost, won) < SIGNIFICANCE:
        failures.append(f"{lost} right clicks lost and {won} won")
    if "kl_mean" in measures and "kl_mean" in unpacked:
        found["kl_added"] = measures["kl_mean"] - unpacked["kl_mean"]
        # Written so that it fails for what is no number.
        if not found["kl_added"] <= MOST_KL:
            failures.append(f"divergence grows by {found['kl_added']:.3f} nats")
    if measures["kv_bytes"] >= unpacked["kv_bytes"]:
        failures.append("no fewer bytes are held")
    right = int(measures["unpacked_right"])
    if right < FEWEST_RIGHT and not failures:
        reason = f"{check.reference} is right on {right} of {count}: too few to tell a loss"
        return Check(
            check.subject,
            check.implementation,
            check.case,
            "skipped",
            check.reference,
            check.dtype,
            reason,
            found,
        )
    return check.finished(failures, found)


def judge_eviction(check: Check, measures: Mapping[str, float], whole: Mapping[str, float]) -> Check:
    """An evicted float cache, or the whole one itself: only bytes are judged here. What eviction may cost is
    judged with the budgets, see ``judge_budget``."""
    more = measures["kv_bytes"] > whole["kv_bytes"]
    return check.finished(["more bytes are held"] if more else [], dict(measures))
