# SPDX-License-Identifier: Apache-2.0
"""Figures over the records of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from starkv.evaluation.records import Record
from starkv.evaluation.statistics import wilson_interval


@dataclass(frozen=True)
class Metric:
    """One figure."""

    name: str
    rule: str
    """By which its answers were graded."""
    value: float
    """From 0 to 1; 0 where there is nothing to grade."""
    count: int
    """Samples in it."""
    low: float | None = None
    """Lower bound at 95 % confidence (Wilson); None for means of figures, which have no such interval."""
    high: float | None = None
    distance: float | None = None
    """Mean pixels from a place to the middle of the right box, over the answers that have one; None where no
    answer has, or nobody knows the boxes."""


def share(name: str, rule: str, records: Sequence[Record], **facets: str) -> Metric:
    """Mean grade by a rule, over the records that have it and these facets."""
    graded = [
        record
        for record in records
        if rule in record.grades and all(record.facets.get(key) == value for key, value in facets.items())
    ]
    total, count = sum(record.grades[rule] for record in graded), len(graded)
    distances = [record.distance for record in graded if record.distance is not None]
    return Metric(
        name,
        rule,
        total / count if count else 0.0,
        count,
        *wilson_interval(total, count),
        distance=sum(distances) / len(distances) if distances else None,
    )


def shares_by(facet: str, rule: str, records: Sequence[Record]) -> list[Metric]:
    """One mean grade for each value of a facet."""
    return [share(f"{facet} {value}", rule, records, **{facet: value}) for value in values_of(facet, records)]


def values_of(facet: str, records: Sequence[Record]) -> list[str]:
    """All values of a facet, sorted."""
    return sorted({record.facets[facet] for record in records if facet in record.facets})


def mean_of(name: str, metrics: Sequence[Metric]) -> Metric:
    """Unweighted mean of figures, without those that nothing is in."""
    filled = [metric for metric in metrics if metric.count]
    if not filled:
        return Metric(name, metrics[0].rule, 0.0, 0)
    value = sum(metric.value for metric in filled) / len(filled)
    return Metric(name, filled[0].rule, value, sum(metric.count for metric in filled))
