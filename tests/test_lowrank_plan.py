# SPDX-License-Identifier: Apache-2.0
"""Rank plans: bytes are what packed rows take, budgets are kept, the best tiles are bought."""

import itertools

import numpy as np
import pytest

from starkv.errors import UsageError
from starkv.lowrank.latent_format import FLOAT16, INT8, NIBBLES, LatentFormat, key_bytes, value_bytes
from starkv.lowrank.pack import pack_keys, pack_values
from starkv.lowrank.plan import (
    FLOOR,
    LayerSpectra,
    RankPlan,
    SplitBudget,
    flat_plan,
    greedy_ranks,
    plan_ranks,
)

DENSE = 2 * 2 * 4 * 128


def model(layers: int = 6, skipped: tuple[int, ...] = (0, 5)) -> list[LayerSpectra | None]:
    """Four KV heads of 128 channels; spectra decay at other speeds in every layer and head."""
    rng = np.random.default_rng(0)

    def spectrum(channels: int) -> np.ndarray:
        return np.exp(-np.arange(channels) / (channels * rng.uniform(0.05, 0.5))) * rng.uniform(0.5, 2)

    return [
        None if layer in skipped else LayerSpectra(tuple(spectrum(128) for _ in range(4)), spectrum(512))
        for layer in range(layers)
    ]


def stored_bytes(plan: RankPlan) -> int:
    """What rows of these ranks take once they are packed."""
    total = 0
    for layer in plan.layers:
        if layer is None:
            total += plan.dense_bytes
            continue
        total += pack_keys([np.ones((1, rank)) for rank in layer.keys], plan.latent).bytes_per_row
        total += pack_values(np.ones((1, layer.values)), plan.latent).bytes_per_row
    return total


@pytest.mark.parametrize("latent", [NIBBLES, INT8], ids=lambda latent: latent.name)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_a_plan_costs_what_a_flat_one_does_and_keeps_more(latent: LatentFormat, fraction: float) -> None:
    layers = model()
    flat = flat_plan(fraction, layers, latent, DENSE)
    plan = plan_ranks(layers, latent, DENSE, flat.total_bytes)
    assert plan.total_bytes <= flat.total_bytes
    assert plan.total_bytes == stored_bytes(plan) == sum(plan.row_bytes)
    assert flat.total_bytes == stored_bytes(flat)
    assert kept(plan, layers) >= kept(flat, layers) * (1 - 1e-12)
    if fraction < 1:
        assert kept(plan, layers) > kept(flat, layers)
        assert plan.total_bytes > flat.total_bytes - 2 * value_bytes(32, latent)
    else:
        assert plan == flat


def kept(plan: RankPlan, layers: list[LayerSpectra | None]) -> float:
    total = 0.0
    for ranks, layer in zip(plan.layers, layers, strict=True):
        if ranks is not None and layer is not None:
            pairs = [*zip(ranks.keys, layer.keys, strict=True), (ranks.values, layer.values)]
            total += sum(float(energies[:rank].sum()) for rank, energies in pairs)
    return total


def test_separate_budgets_are_both_kept() -> None:
    layers = model()
    plan = plan_ranks(layers, NIBBLES, DENSE, SplitBudget(keys=DENSE + 800, values=DENSE + 500))
    ranks = [layer for layer in plan.layers if layer is not None]
    keys = sum(key_bytes(layer.keys, NIBBLES) for layer in ranks)
    values = sum(value_bytes(layer.values, NIBBLES) for layer in ranks)
    assert 800 - 8 < keys <= 800
    assert 500 - 16 < values <= 500


def test_a_sensitive_layer_gets_more() -> None:
    layers = [layer for layer in model(4, ()) if layer is not None]
    budget = flat_plan(0.5, layers, NIBBLES, DENSE).total_bytes
    equal = plan_ranks(layers, NIBBLES, DENSE, budget).layers[2]
    layers[2] = LayerSpectra(layers[2].keys, layers[2].values, key_sensitivity=50.0)
    weighted = plan_ranks(layers, NIBBLES, DENSE, budget).layers[2]
    assert equal is not None
    assert weighted is not None
    assert sum(weighted.keys) > sum(equal.keys)


def test_greedy_is_the_best_choice_of_tiles() -> None:
    rng = np.random.default_rng(2)
    spectra = [np.sort(rng.exponential(size=64))[::-1] for _ in range(3)]
    ranks = greedy_ranks(spectra, [1.0, 2.0, 0.5], 112)
    best = max(
        (choice for choice in itertools.product((16, 32, 48, 64), repeat=3) if sum(choice) <= 112),
        key=lambda choice: sum(
            w * s[:r].sum() for w, s, r in zip((1.0, 2.0, 0.5), spectra, choice, strict=True)
        ),
    )
    assert tuple(ranks) == best


def test_small_and_odd_widths() -> None:
    assert greedy_ranks([np.ones(8), np.ones(40)], [1.0, 1.0], 48) == [8, 40]
    assert greedy_ranks([np.ones(8), np.ones(40)], [1.0, 1.0], 47) == [8, 32]


def test_a_free_tile_is_taken() -> None:
    """A value row is filled up to 8 bytes: the rank that fits into them costs nothing."""
    assert value_bytes(16, NIBBLES) == value_bytes(32, NIBBLES)
    layers = [LayerSpectra((np.ones(16),), np.ones(64))]
    plan = plan_ranks(layers, NIBBLES, DENSE, key_bytes((16,), NIBBLES) + value_bytes(16, NIBBLES))
    assert plan.layers[0] is not None
    assert plan.layers[0].values == 32


def test_a_budget_out_of_reach() -> None:
    layers = model()
    least = 2 * DENSE + 4 * (key_bytes([FLOOR] * 4, NIBBLES) + value_bytes(FLOOR, NIBBLES))
    assert plan_ranks(layers, NIBBLES, DENSE, least).total_bytes == least
    with pytest.raises(
        UsageError, match=rf"budget of {least - 1} .*uncompressed layers {2 * DENSE}; allow {least}"
    ):
        plan_ranks(layers, NIBBLES, DENSE, least - 1)
    with pytest.raises(UsageError, match="can't be reached"):
        plan_ranks(layers, NIBBLES, DENSE, SplitBudget(10**6, 100))


def test_shares_and_energies_that_make_no_sense() -> None:
    for fraction in (0.0, 1.5):
        with pytest.raises(UsageError, match=rf"\(0, 1\], such as 0.5, not {fraction:g}"):
            flat_plan(fraction, model(), FLOAT16, DENSE)
    with pytest.raises(UsageError, match="finite"):
        greedy_ranks([np.array([1.0, np.nan])], [1.0], 100)
    with pytest.raises(UsageError, match="finite"):
        greedy_ranks([np.ones(2)], [np.inf], 100)
