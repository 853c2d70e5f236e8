# SPDX-License-Identifier: Apache-2.0
"""From records of packed caches to figures: the table's, divergences, equal replies, the Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cells import budget_key
from figures import ALL, Comparison, Figure, figures_of
from packings import EVICTED, PackedCell, PackedRecord

from starkv.evaluation.paired import cluster_intervals
from starkv.methods.names import FULL


@dataclass(frozen=True)
class Added:
    """What packing adds to what eviction does: against the same rows as floats."""

    difference: float
    """Of the accuracies."""
    low: float
    """Bounds, 95 %, by a bootstrap over screens or episodes."""
    high: float


@dataclass(frozen=True)
class PackedFigure:
    """One packing at one budget over many questions."""

    plain: Figure
    """Accuracy, distance and bytes."""
    same: float
    """Share of replies that are the whole float cache's."""
    kl_mean: float | None
    """Nats, over all tokens behind the first; None where replies have one token."""
    kl_p95: float | None
    added: Added | None
    """None for rows that are not packed."""
    on_front: bool
    """Whether nothing that holds as few bytes is more often right, nor as often with fewer bytes."""

    @property
    def packing(self) -> str:
        """Row of the tables: the whole float cache is the float cache at budget 1."""
        return EVICTED if self.plain.row == FULL else self.plain.row

    @property
    def against_full(self) -> Comparison | None:
        """The comparison with the whole float cache; None for itself."""
        return self.plain.comparisons.get(FULL)


def packed_figures(suite: str, records: Sequence[PackedRecord], task: str = ALL) -> list[PackedFigure]:
    """Figures of a suite or of one of its tasks."""
    figures = figures_of(suite, records, task)
    asked = [record for record in records if task in (ALL, record.task)]
    added = _added(asked, figures)
    front = pareto_front([(figure.bytes_mean, figure.accuracy) for figure in figures])
    found = []
    for number, figure in enumerate(figures):
        cells: list[PackedCell] = [record.cells[figure.row][budget_key(figure.budget)] for record in asked]
        divergences = [value for cell in cells for value in cell.divergences]
        found.append(
            PackedFigure(
                plain=figure,
                same=sum(cell.same for cell in cells) / len(cells),
                kl_mean=float(np.mean(divergences)) if divergences else None,
                kl_p95=float(np.quantile(divergences, 0.95)) if divergences else None,
                added=added.get((figure.row, figure.budget)),
                on_front=number in front,
            )
        )
    return found


def _added(records: Sequence[PackedRecord], figures: Sequence[Figure]) -> dict[tuple[str, float], Added]:
    keys = [(one.row, one.budget) for one in figures if one.row not in (FULL, EVICTED)]
    if not keys:
        return {}

    def right(record: PackedRecord, row: str, budget: float) -> float:
        return float(record.cells[row][budget_key(budget)].hit)

    differences = np.array(
        [
            [
                right(record, row, budget) - right(record, FULL if budget == 1 else EVICTED, budget)
                for record in records
            ]
            for row, budget in keys
        ]
    )
    bounds = cluster_intervals(differences, [record.group for record in records])
    means = differences.mean(-1)
    return {
        key: Added(float(mean), float(low), float(high))
        for key, mean, (low, high) in zip(keys, means, bounds, strict=True)
    }


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which points no other beats.

    Args:
        points: cost and gain of each.

    Returns:
        indices; of equal points all.
    """
    return {
        number
        for number, (cost, gain) in enumerate(points)
        if not any(
            other_cost <= cost and other_gain >= gain and (other_cost, other_gain) != (cost, gain)
            for other_cost, other_gain in points
        )
    }
