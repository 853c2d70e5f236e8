# SPDX-License-Identifier: Apache-2.0
"""When do an engine's clicks differ too much? Bounds and verdicts of ``starkv validate clicks``.

Bounds stand in a check's measures as ``tolerance_…``, beside what was measured.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from starkv.validation.quant import MOST_LOST, SIGNIFICANCE, sign_test
from starkv.validation.report import Check

LEAST_SAME = 0.98
"""Smallest share of identical replies of two engines that compute the same in float32: a near tie of two
tokens may fall either way."""
FEWEST_RIGHT = 5
"""Right answers of the reference below which no loss could be told from chance."""
MOST_LOST_AT = ((1.0, 0.0), (0.8, 0.05), (0.4, 0.15))
"""Budget, and the accuracy that native compression may lose at it or above, in shares of the questions. Below
the last one every method loses what the screen and the question make it lose."""
SPARE_ROWS = 0.01
"""Rows that may be kept beyond the budget, as a share of the prompt: layers round their parts."""
STAGES = ("vision", "prefill", "compress")


def judge_pair(check: Check, measures: Mapping[str, float], exact: bool) -> Check:
    """An engine against a reference that answered the same questions with the whole cache.

    It fails where right clicks are lost, net of those won, on more than ``MOST_LOST`` of the questions and
    more than chance explains; engines that compute the same fail as well where replies differ. Skipped where
    the reference has too few right answers to tell and replies need not be the same.

    Args:
        check: blank.
        measures: of a comparison.
        exact: whether both compute the same in float32.
    """
    lost, won, count = (int(measures[name]) for name in ("clicks_lost", "clicks_won", "samples"))
    found = {**measures, "tolerance_lost": MOST_LOST}
    failures = []
    if exact:
        found["tolerance_same_replies"] = LEAST_SAME
        if measures["same_replies"] < LEAST_SAME:
            failures.append(
                f"{measures['same_replies']:.1%} of the replies are the same, not {LEAST_SAME:.0%}"
            )
    if lost - won > MOST_LOST * count and sign_test(lost, won) < SIGNIFICANCE:
        failures.append(f"{lost} right clicks lost and {won} won")
    reason = _too_few(check, measures)
    if reason and not failures and not exact:
        return _skipped(check, reason, found)
    return check.finished(failures, found)


def judge_budget(check: Check, measures: Mapping[str, float], budget: float, bounded: bool) -> Check:
    """A compressed cache against the whole one, on one engine.

    It fails where more rows are kept than the budget allows; and, if accuracy is bounded, where even the
    favourable end of the interval is a loss of more than ``MOST_LOST_AT``, or at budget 1 where a reply
    differs. Skipped where accuracy is bounded and the whole cache has too few right answers to tell.

    Args:
        check: blank.
        measures: of a comparison, with ``kept_share`` of the prompt's rows.
        budget: share of the rows.
        bounded: whether accuracy is judged.
    """
    found = {**measures, "tolerance_kept": budget + SPARE_ROWS}
    failures = []
    if measures["kept_share"] > budget + SPARE_ROWS:
        failures.append(f"{measures['kept_share']:.1%} of the rows are kept")
    allowed = next((most for least, most in MOST_LOST_AT if budget >= least), None)
    if bounded and allowed is not None:
        found["tolerance_loss"] = allowed
        least_loss = -measures["difference_high"]
        if least_loss > allowed:
            failures.append(f"{-measures['difference']:.1%} of the questions lost, {least_loss:.1%} at least")
        if budget == 1.0:
            found["tolerance_same_replies"] = 1.0
            if measures["same_replies"] < 1.0:
                failures.append("replies change although every row is kept")
        reason = _too_few(check, measures)
        if reason and not failures and budget < 1.0:
            return _skipped(check, reason, found)
    return check.finished(failures, found)


def judge_memory(check: Check, measures: Mapping[str, float]) -> Check:
    """Bytes of the KV cache: no more kept than there were, no more held than reserved."""
    failures = []
    if measures["kv_bytes_kept"] > measures["kv_bytes_full"]:
        failures.append("more is kept than there was")
    if measures["kv_bytes_held"] > measures["kv_bytes_reserved"]:
        failures.append("more is held than is reserved")
    return check.finished(failures, dict(measures))


def missing(check: Check, reason: str) -> Check:
    """A check that could not be made."""
    return _skipped(check, reason, {})


def latencies(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median and 95th percentile of each stage, in milliseconds.

    Args:
        timings: of each question's reply, at least one; ``decode_ms`` counts all steps together. The first
            one warms the engine up and counts only where it is alone.
    """
    counted = timings[1:] or timings
    values = {stage: [one[f"{stage}_ms"] for one in counted] for stage in STAGES}
    # The first token comes from the prefill.
    steps = [
        one["decode_ms"] / (one["generated_tokens"] - 1) for one in counted if one["generated_tokens"] > 1
    ]
    found = {"samples": float(len(counted))}
    for stage, some in (*values.items(), ("decode_per_token", steps)):
        if some:
            found[f"{stage}_ms_median"] = float(np.median(some))
            found[f"{stage}_ms_p95"] = float(np.quantile(some, 0.95))
    return found


def _too_few(check: Check, measures: Mapping[str, float]) -> str:
    """Why no loss can be told, or nothing if it can."""
    count = int(measures["samples"])
    right = round(measures["reference_accuracy"] * count)
    if right >= FEWEST_RIGHT:
        return ""
    return f"{check.reference} is right on {right} of {count}: too few to tell a loss"


def _skipped(check: Check, reason: str, measures: dict[str, float]) -> Check:
    return Check(
        check.subject,
        check.implementation,
        check.case,
        "skipped",
        check.reference,
        check.dtype,
        reason,
        measures,
    )
