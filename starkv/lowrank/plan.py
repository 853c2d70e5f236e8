# SPDX-License-Identifier: Apache-2.0
"""Ranks without training: greedy, by tiles of 16, within a budget of cache bytes.

Training with a penalty on every threshold ends in one threshold for all heads, held back where it hurts
(STAR-KV, arXiv 2606.08382). This is its training-free counterpart: the tile that buys the most weighted
energy per byte is granted first. Bytes are what a cache really takes: scales, padding, whole tiles and
uncompressed layers included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.lowrank.latent_format import TILE, LatentFormat, key_bytes, value_bytes

FLOOR = 16
"""Least rank of a group of keys and of a layer's values."""


@dataclass(frozen=True)
class LayerSpectra:
    """What rank buys in one layer."""

    keys: tuple[NDArray[Any], ...]
    """Energies of each group's latent channels, descending: ``[full rank]``."""
    values: NDArray[Any]
    key_sensitivity: float = 1.0
    """How much the model's output suffers per energy lost here. Keys and values count in different units, so
    that one pool for both needs measured sensitivities."""
    value_sensitivity: float = 1.0


@dataclass(frozen=True)
class SplitBudget:
    """Separate bytes per token for keys and for values, over all layers. An uncompressed layer takes half of
    its bytes from each."""

    keys: int
    values: int


@dataclass(frozen=True)
class LayerRanks:
    """Ranks of one layer."""

    keys: tuple[int, ...]
    """Of each group of KV heads."""
    values: int

    def row_bytes(self, latent: LatentFormat) -> int:
        """Bytes that one token takes in this layer."""
        return key_bytes(self.keys, latent) + value_bytes(self.values, latent)


@dataclass(frozen=True)
class RankPlan:
    """Ranks of all layers and what they cost."""

    layers: tuple[LayerRanks | None, ...]
    """None where a layer stays uncompressed."""
    latent: LatentFormat
    dense_bytes: int
    """Bytes per token of an uncompressed layer, as it is stored: floats, or quantized rows."""

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """Bytes per token of each layer."""
        return tuple(
            self.dense_bytes if layer is None else layer.row_bytes(self.latent) for layer in self.layers
        )

    @property
    def total_bytes(self) -> int:
        """Bytes per token of all layers."""
        return sum(self.row_bytes)


def plan_ranks(
    layers: Sequence[LayerSpectra | None], latent: LatentFormat, dense_bytes: int, budget: int | SplitBudget
) -> RankPlan:
    """Spend a budget of bytes per token where it keeps the most energy.

    Args:
        layers: spectra; None where a layer stays uncompressed.
        latent: how latents are stored.
        dense_bytes: bytes per token of an uncompressed layer.
        budget: bytes per token over all layers, the uncompressed ones included.

    Raises:
        UsageError: the floor of 16 ranks and the uncompressed layers alone take more, or an energy is not
            finite.
    """
    spectra = [layer for layer in layers if layer is not None]
    keys = [
        _Part(energies, layer.key_sensitivity, _key_cost(latent))
        for layer in spectra
        for energies in layer.keys
    ]
    values = [_Part(layer.values, layer.value_sensitivity, _value_cost(latent)) for layer in spectra]
    fixed = dense_bytes * (len(layers) - len(spectra))
    if isinstance(budget, SplitBudget):
        ranks = _spend(keys, budget.keys, fixed - fixed // 2) + _spend(values, budget.values, fixed // 2)
    else:
        ranks = _spend(keys + values, budget, fixed)
    key_ranks, value_ranks = iter(ranks[: len(keys)]), iter(ranks[len(keys) :])
    return RankPlan(
        tuple(
            None
            if layer is None
            else LayerRanks(tuple(next(key_ranks) for _ in layer.keys), next(value_ranks))
            for layer in layers
        ),
        latent,
        dense_bytes,
    )


def flat_plan(
    fraction: float, layers: Sequence[LayerSpectra | None], latent: LatentFormat, dense_bytes: int
) -> RankPlan:
    """The same share of full rank everywhere, rounded to whole tiles, at least one.

    Its ``total_bytes`` is the budget that a planned share of ranks stands for: a plan of this budget costs as
    much as a flat one.

    Raises:
        UsageError: the share is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"a KV rank is a share of full rank in (0, 1], such as 0.5, not {fraction:g}")

    def share(energies: NDArray[Any]) -> int:
        return min(len(energies), max(FLOOR, round(fraction * len(energies) / TILE) * TILE))

    ranks = tuple(
        None if layer is None else LayerRanks(tuple(map(share, layer.keys)), share(layer.values))
        for layer in layers
    )
    return RankPlan(ranks, latent, dense_bytes)


def greedy_ranks(
    spectra: Sequence[NDArray[Any]],
    weights: Sequence[float],
    budget: int,
    cost: Callable[[int, int], int] | None = None,
    fixed_cost: int = 0,
) -> list[int]:
    """Ranks from the floor up, whole tiles at a time, the most weighted energy per cost first.

    A spectrum takes several tiles at once where a part of them is free, since padding makes steps of memory
    uneven.

    Args:
        spectra: energies of each, descending.
        weights: sensitivity of each.
        budget: most that all may cost together.
        cost: what a spectrum (by its index) of a rank costs; its rank where it is left out.
        fixed_cost: what is spent whatever the ranks are.

    Raises:
        UsageError: the floors cost more than the budget, or an energy or a weight is no finite number.
    """
    if not all(np.isfinite(energies).all() for energies in spectra) or not np.isfinite(weights).all():
        raise UsageError("energies and sensitivities must be finite numbers to plan ranks by")
    price = cost or (lambda _, rank: rank)
    ranks = [min(FLOOR, len(energies)) for energies in spectra]
    floor = fixed_cost + sum(price(index, rank) for index, rank in enumerate(ranks))
    if floor > budget:
        raise UsageError(
            f"a budget of {budget} per token can't be reached: the least rank of {FLOOR} everywhere takes "
            f"{floor - fixed_cost}, uncompressed layers {fixed_cost}; allow {floor} or compress more layers"
        )
    left = budget - floor
    sums = [np.concatenate([[0.0], np.cumsum(energies)]) for energies in spectra]

    def best_step(index: int) -> _Step | None:
        rank, full = ranks[index], len(spectra[index])
        ends = [*range(rank + TILE, full, TILE), full] if rank < full else []
        steps = []
        for end in ends:
            extra = price(index, end) - price(index, rank)
            gain = weights[index] * float(sums[index][end] - sums[index][rank])
            if extra <= left:
                steps.append(_Step(-gain / extra if extra else -np.inf, index, end, extra))
        return min(steps, default=None)

    # The best step of each spectrum that has one. It stays the best until it is taken or too dear.
    steps = {index: step for index in range(len(spectra)) if (step := best_step(index)) is not None}
    while steps:
        step = steps.pop(min(steps.values()).spectrum)
        if step.extra <= left:
            ranks[step.spectrum] = step.rank
            left -= step.extra
        if (following := best_step(step.spectrum)) is not None:
            steps[step.spectrum] = following
    return ranks


class _Step(NamedTuple):
    """Raising one spectrum's rank; the smallest is the best one, and of equal ones the shortest."""

    loss_per_cost: float
    """Negative weighted energy per cost."""
    spectrum: int
    rank: int
    extra: int


class _Part(NamedTuple):
    """What the planner knows of one group's keys or one layer's values."""

    energies: NDArray[Any]
    sensitivity: float
    cost: Callable[[int], int]


def _spend(parts: Sequence[_Part], budget: int, fixed: int) -> list[int]:
    return greedy_ranks(
        [part.energies for part in parts],
        [part.sensitivity for part in parts],
        budget,
        lambda index, rank: parts[index].cost(rank),
        fixed,
    )


def _key_cost(latent: LatentFormat) -> Callable[[int], int]:
    return lambda rank: key_bytes((rank,), latent)


def _value_cost(latent: LatentFormat) -> Callable[[int], int]:
    return lambda rank: value_bytes(rank, latent)
