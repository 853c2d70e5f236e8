# SPDX-License-Identifier: Apache-2.0
"""Factors: nothing of the same rank rebuilds outputs better, with and without a metric; clear errors."""

import numpy as np
import pytest
from lowrank_cases import moment

from starkv.errors import CalibrationError, CheckpointError, UsageError
from starkv.lowrank.factor import (
    Factor,
    key_metric,
    output_pca,
    split_groups,
    value_metric,
    weight_svd,
)


def activations(seed: int = 0, rows: int = 3000, channels: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A weight and outputs whose inputs are far from white, so that weight and outputs have other
    directions."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(channels, 48))
    mixing = rng.normal(size=(48, 48)) * np.exp(-np.arange(48) / 6)
    return weight, rng.normal(size=(rows, 48)) @ mixing.T @ weight.T


def error(factor: Factor, outputs: np.ndarray, metric: np.ndarray | None = None) -> float:
    lost = outputs - factor.lift(factor.compress(outputs))
    return float(np.einsum("nc,cd,nd->", lost, np.eye(lost.shape[1]) if metric is None else metric, lost))


@pytest.mark.parametrize("rank", [1, 5, 16, 31])
def test_output_components_beat_the_weight_and_lose_what_they_say(rank: int) -> None:
    weight, outputs = activations()
    components = output_pca(moment(outputs))
    factor = components.truncated(rank)
    assert error(factor, outputs) < error(weight_svd(weight).truncated(rank), outputs)
    lost = components.energies[rank:].sum() * len(outputs)
    assert error(factor, outputs) == pytest.approx(lost, rel=1e-6)


def test_a_metric_moves_the_error_to_where_it_matters_less() -> None:
    _, outputs = activations()
    second = moment(outputs)
    metric = key_metric(np.exp(np.random.default_rng(1).normal(size=(1, 16)) * 2))
    plain, weighted = output_pca(second).truncated(8), output_pca(second, metric).truncated(8)
    assert error(weighted, outputs, metric) < 0.9 * error(plain, outputs, metric)
    assert error(plain, outputs) < error(weighted, outputs)
    lost = output_pca(second, metric).energies[8:].sum() * len(outputs)
    assert error(weighted, outputs, metric) == pytest.approx(lost, rel=1e-6)


def test_the_key_metric_counts_both_channels_of_a_pair() -> None:
    diagonal = np.diagonal(key_metric(np.array([[1.0, 2.0], [3.0, 4.0]])))
    assert diagonal.tolist() == [1, 2, 1, 2, 3, 4, 3, 4]


def test_the_value_metric_is_the_error_behind_the_output_projection() -> None:
    """One KV head: error of y in the metric is that of what its query heads' columns of W_o make of it,
    summed."""
    rng = np.random.default_rng(0)
    output_weight = rng.normal(size=(24, 3 * 8))
    lost = rng.normal(size=8)
    expected = sum(np.sum((output_weight[:, 8 * head : 8 * head + 8] @ lost) ** 2) for head in range(3))
    assert lost @ value_metric(output_weight, 1, 8) @ lost == pytest.approx(expected)


def test_the_value_metric_has_a_block_per_kv_head() -> None:
    output_weight = np.random.default_rng(0).normal(size=(24, 6 * 4))
    metric = value_metric(output_weight, 2, 4)
    assert not metric[:4, 4:].any()
    np.testing.assert_allclose(metric[4:, 4:], value_metric(output_weight[:, 12:], 1, 4))


def test_groups_of_heads_lose_less_at_the_same_rank() -> None:
    weight, _ = activations()
    apart = sum(np.sum(weight_svd(part).energies[4:]) for part in split_groups(weight, 4, 1))
    pairs = sum(np.sum(weight_svd(part).energies[8:]) for part in split_groups(weight, 4, 2))
    together = sum(np.sum(weight_svd(part).energies[16:]) for part in split_groups(weight, 4, 4))
    assert together < pairs < apart


def test_ranks_that_do_not_exist() -> None:
    weight, _ = activations()
    decomposition = weight_svd(weight)
    for rank in (0, 33):
        with pytest.raises(UsageError, match=rf"rank {rank} is not possible.*ranks 1 to 32"):
            decomposition.truncated(rank)
    with pytest.raises(UsageError, match="leaves no rank"):
        decomposition.above(1e9)
    with pytest.raises(UsageError, match="4 KV heads can't be divided into groups of 3"):
        split_groups(weight, 4, 3)


def test_numbers_that_are_none() -> None:
    broken = np.eye(4)
    broken[1, 2] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        weight_svd(broken)
    with pytest.raises(CalibrationError, match="second moment of a projection's outputs holds"):
        output_pca(broken)
    with pytest.raises(CalibrationError, match="error metric holds"):
        output_pca(np.eye(4), broken)
    with pytest.raises(CalibrationError, match="every output of a projection was zero"):
        output_pca(np.zeros((4, 4)))
    with pytest.raises(CalibrationError, match="zero everywhere"):
        output_pca(np.eye(4), np.zeros((4, 4)))
