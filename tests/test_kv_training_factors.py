# SPDX-License-Identifier: Apache-2.0
"""Factors in training: bytes, pinning, quantized latents, and what becomes of them in an engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from starkv.errors import UsageError
from starkv.kv_packing.file import load_packing, save_packing
from starkv.kv_packing.low_rank import LowRankPacking
from starkv.kv_packing.options import PackingOptions
from starkv.kv_packing.retarget import check_factors, packing_from_factors
from starkv.kv_training.fake_quant import fake_quantize
from starkv.kv_training.options import TrainingOptions
from starkv.kv_training.pinned import masked_gains, pin
from starkv.kv_training.soft import OPEN_THRESHOLD, SoftFactors, SoftLayer, SoftPart
from starkv.kv_training.start import budget_bytes, pace
from starkv.lowrank.latent_format import FLOAT32, INT8, NIBBLES, NIBBLES_4_3, LatentFormat
from starkv.lowrank.pack import pack_values, unpack_values
from starkv.manifest import TextShape

HEADS, DIM, LAYERS = 2, 48, 3


def make_part(width: int, seed: int) -> SoftPart:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(2, width, width, generator=generator)
    gains = 1 + 0.2 * torch.rand(width, generator=generator)
    strengths = torch.linspace(3.0, 0.05, width) * (1 + seed % 3)
    return SoftPart(up, down, gains, torch.tensor(OPEN_THRESHOLD), strengths)


def make_soft() -> SoftFactors:
    layers = []
    for layer in range(LAYERS):
        keys = tuple(make_part(DIM, 10 * layer + head) for head in range(HEADS))
        layers.append(SoftLayer(keys, make_part(HEADS * DIM, 10 * layer + 5)))
    return SoftFactors(layers)


def options(rank: float, quant: str = "none") -> TrainingOptions:
    return TrainingOptions(PackingOptions(quant, rank))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rank", "quant"), [(0.5, "none"), (0.7, "int4"), (0.4, "int8"), (1.0, "int4"), (0.17, "int8")]
)
def test_thresholds_at_their_pace_meet_the_budget_and_pinning_spends_it(rank: float, quant: str) -> None:
    soft, wanted = make_soft(), options(rank, quant)
    budget = budget_bytes(soft, wanted)
    step = pace(soft, wanted.latent, budget, 10)
    for part in soft.parts:
        part.threshold.fill_(OPEN_THRESHOLD + 10 * step)
        part.keep_floor()
    assert sum(layer.row_bytes(wanted.latent) for layer in soft.thresholds) <= budget
    pinned = pin(soft, wanted.latent, budget)
    # Less is left than a further channel of values would take.
    assert budget - 8 < pinned.row_bytes <= budget
    for layer in pinned.layers:
        assert all(part.up.shape[1] % 16 == 0 for part in layer.keys)


def test_pruning_does_not_change_the_function() -> None:
    part = make_part(HEADS * DIM, 1)
    soft = SoftFactors([SoftLayer((make_part(DIM, 2), make_part(DIM, 3)), part)])
    for each in soft.parts:
        each.threshold.fill_(1.5)
    pinned = pin(soft, FLOAT32, sum(layer.row_bytes(FLOAT32) for layer in soft.thresholds))
    outputs = torch.randn(7, HEADS * DIM, generator=torch.Generator().manual_seed(0))

    def masked(one: SoftPart, y: torch.Tensor, rank: int) -> torch.Tensor:
        return (y @ one.down.T * masked_gains(one, rank)) @ one.up.T

    values = pinned.layers[0].values
    assert values.up.shape[1] < len(part.up)
    torch.testing.assert_close(
        pinned.values(0, outputs), masked(part, outputs, values.up.shape[1]), rtol=1e-4, atol=1e-3
    )
    expected = [
        masked(one, y, pruned.up.shape[1])
        for one, y, pruned in zip(
            soft.layers[0].keys, outputs.split(DIM, -1), pinned.layers[0].keys, strict=True
        )
    ]
    torch.testing.assert_close(pinned.keys(0, outputs), torch.cat(expected, -1), rtol=1e-4, atol=1e-3)


def test_a_hard_cut_is_the_soft_one_far_from_the_threshold() -> None:
    part = make_part(HEADS * DIM, 4)
    far = replace(
        part, first_strengths=torch.where(part.first_strengths > 1, 4.0, 0.5), threshold=torch.tensor(1.5)
    )
    kept = int((far.strengths > far.threshold).sum())
    outputs = torch.randn(5, HEADS * DIM, generator=torch.Generator().manual_seed(0))
    expected = (outputs @ far.down.T * masked_gains(far, kept)) @ far.up.T
    torch.testing.assert_close(far.rebuild(outputs), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("latent", [INT8, NIBBLES, NIBBLES_4_3], ids=lambda latent: latent.name)
@pytest.mark.parametrize("rank", [1, 4, 16, 53])
def test_latents_are_rounded_as_they_are_packed(latent: LatentFormat, rank: int) -> None:
    latents = torch.randn(30, rank, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    rounded = fake_quantize(latents, latent)
    packed = pack_values(latents.detach().numpy(), latent)
    np.testing.assert_array_equal(rounded.detach().numpy(), unpack_values(packed, rank, latent))
    rounded.sum().backward()
    assert latents.grad is not None
    assert torch.equal(latents.grad, torch.ones_like(latents))


def packing() -> LowRankPacking:
    soft = make_soft()
    for part in soft.parts:
        part.threshold.fill_(2.0)
        part.keep_floor()
    bias = np.random.default_rng(0).normal(size=(HEADS, DIM)).astype(np.float32)
    return pin(soft, FLOAT32, 0).packing([(bias, -bias)] * LAYERS, 16)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_factors_for_quantized_latents_are_the_same_function(quant: str, tmp_path) -> None:
    plain = packing()
    save_packing(plain, tmp_path / "factors")
    read = load_packing(tmp_path / "factors")
    assert isinstance(read, LowRankPacking)
    folded = packing_from_factors(read, quant)  # type: ignore[arg-type]
    assert folded.latent is {"int8": INT8, "int4": NIBBLES}[quant]
    for before, after in zip(plain.layers, folded.layers, strict=True):
        pairs = zip((*before.keys, before.values), (*after.keys, after.values), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(other.up @ other.down, one.up @ one.down, atol=1e-4)
            assert np.abs(other.down - one.down).max() > 0.1
    with pytest.raises(UsageError, match="already; give the file"):
        packing_from_factors(folded, "int4")
    assert packing_from_factors(read, "none") == read


def test_factors_of_another_model_are_refused() -> None:
    text = TextShape(
        layers=LAYERS,
        hidden=64,
        intermediate=64,
        heads=4,
        kv_heads=HEADS,
        head_dim=DIM,
        vocab=10,
        rope_theta=1e4,
        mrope_section=None,
        max_positions=100,
        tied_embedding=True,
    )
    check_factors(packing(), text, "a.factors")
    for change in ({"layers": 4}, {"kv_heads": 4}, {"head_dim": 96}):
        with pytest.raises(UsageError, match=r"a\.factors holds factors of 3 layers .* `starkv train-kv`"):
            check_factors(packing(), text.model_copy(update=change), "a.factors")


def test_ranks_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match=r"a share of full rank in \(0, 1\]"):
        options(1.2)
    with pytest.raises(UsageError, match=r"least rank is 16 of 48 channels; give --kv-rank 0\.33 or more"):
        budget_bytes(make_soft(), options(0.15))
    with pytest.raises(UsageError, match="--kv-rank"):
        TrainingOptions(PackingOptions("int8"))
    with pytest.raises(UsageError, match="at least 8 steps"):
        TrainingOptions(PackingOptions("none", 0.5), steps=3)
