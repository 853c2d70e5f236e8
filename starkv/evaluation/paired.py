# SPDX-License-Identifier: Apache-2.0
"""Whether two ways of answering the same questions differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Discordance:
    """Questions that one of two answered rightly and the other did not: all that McNemar's test looks at."""

    only_first: int
    only_second: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> "Discordance":
        """Compare grades of the same questions in the same order.

        Raises:
            ValueError: the numbers of grades differ.
        """
        pairs = list(zip(first, second, strict=True))
        return cls(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))

    @property
    def p_value(self) -> float:
        """Two-sided exact McNemar test: how likely a split at least as uneven is if either is as often
        right. It takes the questions for independent."""
        trials = self.only_first + self.only_second
        tail = sum(math.comb(trials, k) for k in range(min(self.only_first, self.only_second) + 1))
        # Whole numbers up to the division: 2^trials exceeds what a float holds.
        return min(1.0, 2 * tail / (1 << trials))


def cluster_intervals(
    differences: NDArray[np.float64],
    clusters: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> NDArray[np.float64]:
    """Percentile bootstrap of mean differences that draws whole clusters, because the questions of a cluster
    (of one screen, of one episode) are not independent.

    Args:
        differences: ``[K, N]``: grade of one minus grade of the other, of K pairs on the same N questions.
        clusters: ``[N]`` name of each question's cluster.
        draws: resampled data sets, each of as many clusters as there are.
        seed: of the draws, which are the same for all K.
        confidence: of the intervals, above 0 and below 1.

    Returns:
        ``[K, 2]``: lower and upper bounds; where there is only one cluster both are the mean, for nothing is
        known of the spread.

    Raises:
        ValueError: there are no questions, or not one cluster for each.
    """
    differences = np.atleast_2d(np.asarray(differences, np.float64))
    count = differences.shape[1]
    if not count or len(clusters) != count:
        raise ValueError(f"{count} questions and {len(clusters)} names of clusters")
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    belongs = np.zeros((count, len(names)))
    belongs[np.arange(count), member.reshape(-1)] = 1.0
    sums, sizes = differences @ belongs, belongs.sum(0)
    # How often each cluster is drawn says all of a resampled data set.
    even = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(seed).multinomial(len(names), even, draws).astype(np.float64)
    means = (sums @ drawn.T) / (drawn @ sizes)
    tail = (1 - confidence) / 2
    bounds: NDArray[np.float64] = np.quantile(means, [tail, 1 - tail], axis=1).T
    return bounds


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, adjusted so that one wrong rejection among all of them is as unlikely as
    each would be alone (Holm 1979), in the given order."""
    adjusted, worst = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted
