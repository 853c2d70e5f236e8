# SPDX-License-Identifier: Apache-2.0
"""What mutual information pure chance shows on a screenshot's grid. Host arithmetic, needs numpy alone.

The estimator of STaR-KV ranks a screenshot's scores into 16 equally full bins and counts them against 12 x 12
cells of the screen. Even a random order then shows mutual information, all the more the smaller the
screenshot: 0.47 nats at 1080p, and at 144 tokens or fewer, each in a cell of its own, the most there can be.
Since the counts of both axes are fixed (equal bins here, the grid there), the expectation over random orders
is a number that depends on the grid alone. Subtracting it and dividing by what is left to reach gives the
*adjusted* mutual information (Vinh, Epps and Bailey, JMLR 11, 2010): 0 for chance, 1 for the most there can
be.
"""

from functools import lru_cache
from math import lgamma, log

import numpy as np
from numpy.typing import NDArray

SPATIAL_BINS = 12
VALUE_BINS = 16


def spatial_cells(cells: int, grid_rows: int, grid_columns: int) -> NDArray[np.int64]:
    """Cell of the 12 x 12 screen that each token's centre falls into, ``[cells]`` in 0 … 143.

    floor(12 · (row + ½) / rows) in whole numbers, which floating point gives as well for every grid up to 400
    rows.
    """
    token = np.arange(cells)
    row = token // grid_columns
    column = token % grid_columns
    row_bin = np.minimum(SPATIAL_BINS * (2 * row + 1) // (2 * grid_rows), SPATIAL_BINS - 1)
    column_bin = np.minimum(SPATIAL_BINS * (2 * column + 1) // (2 * grid_columns), SPATIAL_BINS - 1)
    bins: NDArray[np.int64] = row_bin * SPATIAL_BINS + column_bin
    return bins


def value_bins(cells: int) -> NDArray[np.int64]:
    """Bin of each rank, ``[cells]`` in 0 … 15: equally full ones."""
    return np.arange(cells) * VALUE_BINS // cells


@lru_cache(maxsize=256)
def chance_and_span(cells: int, grid_rows: int, grid_columns: int) -> tuple[float, float]:
    """Expected mutual information of a random order, and what is left from there to the most there can be.

    Both in nats. The second is 0 where a screenshot is so small that chance alone reaches the most.
    """
    if cells < 2:
        return 0.0, 0.0
    places, values = spatial_cells(cells, grid_rows, grid_columns), value_bins(cells)
    # Many cells have equally many tokens: work with distinct counts and how often each occurs.
    place_sizes, place_times = np.unique(np.bincount(places)[np.bincount(places) > 0], return_counts=True)
    value_sizes, value_times = np.unique(np.bincount(values)[np.bincount(values) > 0], return_counts=True)
    expected = 0.0
    for a, a_times in zip(value_sizes.tolist(), value_times.tolist(), strict=True):
        for b, b_times in zip(place_sizes.tolist(), place_times.tolist(), strict=True):
            expected += a_times * b_times * _expected_term(cells, a, b)
    place_entropy = _entropy(place_sizes, place_times, cells)
    value_entropy = _entropy(value_sizes, value_times, cells)
    span = min(place_entropy, value_entropy) - expected
    # Singletons on one side make the information certain; what rounding leaves of the span is not real.
    return expected, span if span > 1e-9 else 0.0


def _entropy(sizes: NDArray[np.int64], times: NDArray[np.int64], total: int) -> float:
    shares = sizes / total
    return float(-(times * shares * np.log(shares)).sum())


def _expected_term(total: int, a: int, b: int) -> float:
    """Expectation of n/N · ln(N n / (a b)) for n the overlap of a random a-set and a fixed b-set."""
    fixed = _log_factorial(a) + _log_factorial(b) + _log_factorial(total - a) + _log_factorial(total - b)
    fixed -= _log_factorial(total)
    term = 0.0
    for n in range(max(1, a + b - total), min(a, b) + 1):
        log_probability = fixed - (
            _log_factorial(n)
            + _log_factorial(a - n)
            + _log_factorial(b - n)
            + _log_factorial(total - a - b + n)
        )
        term += n / total * log(total * n / (a * b)) * float(np.exp(log_probability))
    return term


def _log_factorial(n: int) -> float:
    return lgamma(n + 1)
