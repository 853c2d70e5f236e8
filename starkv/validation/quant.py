# SPDX-License-Identifier: Apache-2.0
"""What quantization changes: the distribution of each token, and where the model clicks.

Every engine is fed the reply that the reference wrote, so that position by position both have read the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from starkv.validation.report import Check

MOST_KL = {"int8": 0.01, "int4": 0.1}
"""Largest mean divergence in nats that passes, by the storage of the decoder's layers; docs/quantization.md
says why."""
MOST_LOST = 0.01
"""Largest share of prompts whose right click may be lost, net of those won."""
SIGNIFICANCE = 0.05
"""How unlikely a loss of clicks must be by chance before it counts."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Answer:
    """What an engine did on one prompt."""

    divergences: npt.NDArray[np.float64]
    """[tokens] KL divergence of each token's distribution from the reference's, in nats."""
    agreements: npt.NDArray[np.bool_]
    """[tokens] whether the most likely token is the reference's."""
    click: Point | None
    """Where its own greedy reply clicks, in pixels of the screen; None if it clicks nowhere."""
    right: bool | None
    """Whether that is inside the right box; None where nobody knows the box."""


def kl_divergence(
    reference: npt.NDArray[np.floating], other: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Kullback-Leibler divergence of ``other`` from ``reference``: logits [..., V] each → [...] nats."""
    expected, found = log_softmax(reference), log_softmax(other)
    divergence: npt.NDArray[np.float64] = (np.exp(expected) * (expected - found)).sum(-1)
    # Rounding can make equal distributions differ by less than nothing.
    return np.maximum(divergence, 0.0)


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities of logits [..., V], in float64."""
    shifted = logits.astype(np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    logarithms: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logarithms


def sign_test(lost: int, won: int) -> float:
    """Probability that at least ``lost`` of ``lost + won`` changes are losses if both are equally likely."""
    changes = lost + won
    return sum(math.comb(changes, count) for count in range(lost, changes + 1)) / float(2**changes)


def measure(reference: Sequence[Answer], answers: Sequence[Answer]) -> dict[str, float]:
    """Figures of one engine against the reference, over the same prompts.

    Returns:
        ``kl_mean``, ``kl_p99`` and ``top1_agreement`` over all tokens; ``same_clicks``, the share of prompts
        with the very same click (or none in both), and ``click_distance``, the mean distance in pixels where
        both click; where boxes are known also ``clicks_right``, ``reference_clicks_right``, ``clicks_lost``
        and ``clicks_won``.
    """
    divergences = np.concatenate([answer.divergences for answer in answers])
    pairs = list(zip(reference, answers, strict=True))
    measures = {
        "kl_mean": float(divergences.mean()),
        "kl_p99": float(np.quantile(divergences, 0.99)),
        "top1_agreement": float(np.concatenate([answer.agreements for answer in answers]).mean()),
        "tokens": float(len(divergences)),
        "prompts": float(len(answers)),
        "same_clicks": sum(expected.click == found.click for expected, found in pairs) / len(pairs),
    }
    distances = [
        math.dist(expected.click, found.click) for expected, found in pairs if expected.click and found.click
    ]
    if distances:
        measures["click_distance"] = sum(distances) / len(distances)
    judged = [(expected.right, found.right) for expected, found in pairs if found.right is not None]
    if judged:
        measures |= {
            "clicks_right": sum(bool(found) for _, found in judged) / len(judged),
            "reference_clicks_right": sum(bool(expected) for expected, _ in judged) / len(judged),
            "clicks_lost": float(sum(bool(expected) and not found for expected, found in judged)),
            "clicks_won": float(sum(bool(found) and not expected for expected, found in judged)),
        }
    return measures


def judge(check: Check, measures: dict[str, float]) -> Check:
    """The check with its outcome.

    It fails where the mean divergence is above ``MOST_KL`` of the check's dtype, or where more right clicks
    are lost than won, by more than ``MOST_LOST`` of the prompts and by more than chance explains with a
    probability of ``SIGNIFICANCE``. Clicks that land elsewhere in the right box are no failure.
    """
    failures = []
    limit = MOST_KL.get(check.dtype)
    if limit is not None and not measures["kl_mean"] <= limit:
        failures.append(f"mean KL divergence {measures['kl_mean']:.3g} is above {limit}")
    lost, won = int(measures.get("clicks_lost", 0)), int(measures.get("clicks_won", 0))
    if lost - won > MOST_LOST * measures["prompts"] and sign_test(lost, won) < SIGNIFICANCE:
        failures.append(f"{lost} right clicks lost and {won} won")
    return check.finished(failures, measures)
