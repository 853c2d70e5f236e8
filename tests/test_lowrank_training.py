# SPDX-License-Identifier: Apache-2.0
"""Soft thresholds and losses: exact gradients, and thresholds that reach a budget of cache bytes."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from starkv.errors import UsageError
from starkv.lowrank.factor import weight_svd
from starkv.lowrank.latent_format import INT8, NIBBLES, LatentFormat, key_bytes, value_bytes
from starkv.lowrank.objective import (
    LayerThresholds,
    cache_excess,
    distillation_loss,
    kept_ranks,
    threshold_pressure,
)
from starkv.lowrank.soft_threshold import soft_threshold


@pytest.mark.parametrize("leak", [0.0, 0.1])
def test_gradients_are_exact(leak: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 20, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
    thresholds = torch.tensor([[0.3], [0.9], [1.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, alpha: soft_threshold(x, alpha, sharpness=5.0, leak=leak), (values, thresholds)
    )


def test_it_is_what_the_factor_is_cut_by() -> None:
    decomposition = weight_svd(np.random.default_rng(0).normal(size=(16, 24)))
    threshold = float(decomposition.strengths[8]) - 0.01
    factor = decomposition.softly_above(threshold)
    strengths = torch.from_numpy(decomposition.strengths)
    cut = soft_threshold(strengths, torch.tensor(threshold, dtype=torch.float64)).numpy()
    assert np.count_nonzero(cut) == factor.rank == 9
    left = decomposition.full
    np.testing.assert_allclose(
        factor.up @ factor.down, left.up @ np.diag(cut / decomposition.strengths) @ left.down
    )


def test_values_of_16_bits_keep_their_dtype_and_thresholds_must_not_have_them() -> None:
    values = torch.tensor([0.5, 1.5, 3.0], dtype=torch.bfloat16, requires_grad=True)
    threshold = torch.tensor(1.0, requires_grad=True)
    soft_threshold(values, threshold).sum().backward()
    assert values.grad is not None
    assert values.grad.dtype == torch.bfloat16
    assert threshold.grad is not None
    assert threshold.grad.dtype == torch.float32
    with pytest.raises(UsageError, match=r"must be float32, not torch\.bfloat16"):
        soft_threshold(values, threshold.bfloat16())


def test_distillation_counts_real_positions_only() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 11, generator=generator).unbind()
    student.requires_grad_()
    counted = torch.tensor([[True, True, False, False, False], [True] * 5])
    loss = distillation_loss(student, teacher, counted)
    expected = [
        (F.softmax(t, -1) * (F.log_softmax(t, -1) - F.log_softmax(s, -1))).sum()
        for s, t in zip(student[counted], teacher[counted], strict=True)
    ]
    assert float(loss.detach()) == pytest.approx(float(torch.stack(expected).detach().sum()) / 7, rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert not student.grad[0, 2:].any()
    assert float(distillation_loss(teacher, teacher, counted)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UsageError, match="padding only"):
        distillation_loss(student, teacher, torch.zeros(2, 5, dtype=torch.bool))


def test_published_pressure_is_equal_everywhere() -> None:
    thresholds = torch.zeros(5, requires_grad=True)
    threshold_pressure(thresholds).backward()
    assert thresholds.grad is not None
    assert thresholds.grad.tolist() == [-1.0] * 5


def make_layer(seed: int, spread: float = 1.0) -> LayerThresholds:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(4, 64, generator=generator).sort(descending=True).values * spread
    values = torch.rand(256, generator=generator).sort(descending=True).values
    return LayerThresholds(
        keys.requires_grad_(),
        torch.zeros(4, requires_grad=True),
        values.requires_grad_(),
        torch.zeros((), requires_grad=True),
    )


@pytest.mark.parametrize("latent", [NIBBLES, INT8], ids=lambda latent: latent.name)
def test_thresholds_reach_a_budget_of_cache_bytes_and_stop(latent: LatentFormat) -> None:
    layers = [make_layer(seed) for seed in range(3)]
    full = sum(layer.row_bytes(latent) for layer in layers)
    budget = int(0.4 * full)
    thresholds = [one for layer in layers for one in (layer.key_thresholds, layer.value_threshold)]
    optimizer = torch.optim.Adam(thresholds, lr=1e-2)
    for _ in range(400):
        loss = cache_excess(layers, latent, budget)
        stored = sum(layer.row_bytes(latent) for layer in layers)
        assert float(loss.detach()) == pytest.approx(max(0.0, stored / budget - 1), abs=1e-5)
        if stored <= budget:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0.9 * budget < stored <= budget
    assert all(layer.key_strengths.grad is None and layer.value_strengths.grad is None for layer in layers)
    optimizer.zero_grad()
    cache_excess(layers, latent, budget).backward()
    assert all(not one.grad.any() for one in thresholds if one.grad is not None)


def test_bytes_of_thresholds_are_those_of_their_ranks() -> None:
    layer = make_layer(0)
    with torch.no_grad():
        layer.key_thresholds.copy_(torch.tensor([0.0, 0.3, 0.9, 5.0]))
        layer.value_threshold.fill_(0.5)
    ranks = kept_ranks(layer.key_strengths, layer.key_thresholds[:, None]).tolist()
    assert ranks[0] == 64
    assert ranks[3] == 0
    value_rank = int((layer.value_strengths > 0.5).sum())
    expected = key_bytes([*ranks[:3], 1], NIBBLES) + value_bytes(value_rank, NIBBLES)
    assert layer.row_bytes(NIBBLES) == expected


def test_the_push_is_where_a_step_frees_memory() -> None:
    """Of two groups the one whose strengths lie at its threshold is pushed harder; the published loss pushes
    both alike."""
    strengths = torch.stack([torch.full((64,), 0.5), torch.linspace(0.45, 2.0, 64).flip(0)])
    layer = LayerThresholds(
        strengths,
        torch.full((2,), 0.45, requires_grad=True),
        torch.ones(64),
        torch.zeros((), requires_grad=True),
    )
    cache_excess([layer], NIBBLES, 1).backward()
    gradient = layer.key_thresholds.grad
    assert gradient is not None
    assert gradient[0] < gradient[1] < 0
