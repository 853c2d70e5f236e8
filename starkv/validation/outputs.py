# SPDX-License-Identifier: Apache-2.0
"""How far the outputs of two engines are apart, and how far rounding may bring them apart.

Rounding is no bound that could be looked up: how much of it reaches an output depends on the model, the
prompt and the layer, and attention sometimes turns on a hair. So it is measured: a third run of the
reference, in which the result of every operator is rounded as the engine rounds it, shows what rounding does
to each output. A right engine differs from the reference as much as that run does, give or take.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MEASURES = ("largest", "total", "typical")


@dataclass(frozen=True)
class Deviation:
    """Distance of a tensor from what it should be, in three ways: what is wrong shows in one of them."""

    largest: float
    """Largest difference, as a share of the largest number: tells of a few wrong numbers."""
    total: float
    """Root of the mean square of all differences, as a share of the numbers' own: of wrong parts."""
    typical: float
    """Median over rows (the last axis) of the same: of what is wrong everywhere, and barely moved by a row
    whose attention turned to another."""

    def beyond(self, bounds: "Deviation") -> list[str]:
        """Names of the measures that exceed their bounds; no bound holds what is not a number."""
        pairs = zip(MEASURES, astuple(self), astuple(bounds), strict=True)
        return [name for name, value, bound in pairs if not value <= bound]


NONE = Deviation(0.0, 0.0, 0.0)
ANYTHING = Deviation(np.inf, np.inf, np.inf)


def deviation(expected: NDArray[np.floating], actual: NDArray[np.floating]) -> Deviation:
    """Measure the distance of ``actual`` from ``expected``, both [..., D]; infinite if shapes differ or it is
    not finite."""
    if expected.shape != actual.shape or not np.isfinite(actual).all():
        return ANYTHING
    right = expected.astype(np.float64)
    difference = actual.astype(np.float64) - right
    sizes, errors = (np.sqrt(np.square(each).mean(-1)) for each in (right, difference))
    return Deviation(
        _share(np.abs(difference).max(), np.abs(right).max()),
        _share(np.sqrt(np.square(difference).mean()), np.sqrt(np.square(right).mean())),
        # Rows that should be zero have no size to compare with; the other measures see them.
        float(np.median(errors[sizes > 0] / sizes[sizes > 0])) if (sizes > 0).any() else 0.0,
    )


def _share(part: float, whole: float) -> float:
    if whole:
        return float(part / whole)
    return float(np.inf if part else 0.0)


def summary(deviations: Iterable[Deviation]) -> Deviation:
    """Of several tensors of a kind: the largest of ``largest``, the medians of the others."""
    columns = list(zip(*map(astuple, deviations), strict=True))
    return Deviation(float(max(columns[0])), float(np.median(columns[1])), float(np.median(columns[2])))


def summaries(
    expected: Iterable[Mapping[str, NDArray[np.floating]]],
    actual: Iterable[Mapping[str, NDArray[np.floating]]],
) -> dict[str, Deviation]:
    """Distances of all tensors of two engines: name → of that tensor over all prompts.

    What a reply's tokens put out (``decode.3``) is one tensor, ``decode``.

    Args:
        expected: by name, for each prompt.
        actual: likewise; what is missing is infinitely far.
    """
    found: dict[str, list[Deviation]] = defaultdict(list)
    for right, other in zip(expected, actual, strict=True):
        for name, tensor in right.items():
            one = deviation(tensor, other[name]) if name in other else ANYTHING
            found[tensor_name(name)].append(one)
    return {name: summary(deviations) for name, deviations in found.items()}


def tensor_name(name: str) -> str:
    """Name that an output is counted under."""
    return name.partition(".")[0] if name.startswith("decode") else name


def share_of_equal(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Share of equal entries: of flags, of those that are set in ``expected``; 0 if shapes differ."""
    if expected.shape != actual.shape:
        return 0.0
    if expected.dtype == np.bool_:
        return float((expected & actual).sum() / max(1, expected.sum()))
    return float((expected == actual).mean())
