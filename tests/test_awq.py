# SPDX-License-Identifier: Apache-2.0
"""Activation-aware quantization: the mathematics of scales and clipping, against numpy and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starkv.export.quantize.awq import value_channels
from starkv.export.quantize.awq_clip import search_clips
from starkv.export.quantize.awq_plan import CLIP_RATIOS
from starkv.export.quantize.awq_scales import Rounding, candidate_scales, rounding_error, search_group
from starkv.export.quantize.awq_source import clip_blocks
from starkv.export.quantize.blockwise import dequantize_blockwise, quantize_rows
from starkv.manifest import TextShape

Array = np.ndarray
FOUR_BITS = Rounding(4, 32)


def rounded(weight: Array, rounding: Rounding) -> Array:
    """What the exporter stores of a weight [N,K], by its own code."""
    codes, scales = quantize_rows(np.ascontiguousarray(weight), rounding.bits, rounding.block_size)
    return dequantize_blockwise(codes.T, scales.T).T


def relative_error(weight: Array, stored: Array, rows: Array) -> float:
    exact, wrong = rows @ weight.T, rows @ (stored - weight).T
    return float((wrong**2).sum() / (exact**2).sum())


def outlier_layer(seed: int, outliers: int, factor: float) -> tuple[Array, Array]:
    """Weights [48,128] and activations [200,128], a few channels of which are much larger than others."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((200, 128)).astype(np.float32)
    rows[:, random.choice(128, outliers, replace=False)] *= factor
    return random.standard_normal((48, 128)).astype(np.float32), rows


def search(weight: Array, rows: Array, rounding: Rounding = FOUR_BITS) -> tuple[Array, float]:
    features = torch.from_numpy(rows)
    scales, result = search_group(
        [torch.from_numpy(weight)], features, features.abs().mean(0), torch.arange(rows.shape[1]), rounding
    )
    return scales.numpy(), result.exponent


@given(seed=st.integers(0, 2**32 - 1), outliers=st.integers(1, 4), factor=st.floats(20, 100))
@settings(max_examples=25, deadline=None)
def test_scales_protect_channels_with_outliers(seed: int, outliers: int, factor: float) -> None:
    """On activations that the search has not seen, too, and by the exporter's own rounding."""
    weight, rows = outlier_layer(seed, outliers, factor)
    seen, unseen = rows[:100], rows[100:]
    scales, exponent = search(weight, seen)
    plain = relative_error(weight, rounded(weight, FOUR_BITS), unseen)
    scaled = relative_error(weight, rounded(weight * scales, FOUR_BITS) / scales, unseen)
    assert exponent > 0
    assert scaled < 0.75 * plain


@given(seed=st.integers(0, 2**32 - 1), factor=st.sampled_from([1.0, 3.0, 30.0]))
@settings(max_examples=25, deadline=None)
def test_no_result_is_worse_than_plain_rounding_where_it_was_searched(seed: int, factor: float) -> None:
    weight, rows = outlier_layer(seed, 3, factor)
    scales, exponent = search(weight, rows)
    plain = relative_error(weight, rounded(weight, FOUR_BITS), rows)
    scaled = relative_error(weight, rounded(weight * scales, FOUR_BITS) / scales, rows)
    assert scaled <= plain * (1 + 1e-4)
    if exponent == 0:
        np.testing.assert_array_equal(scales, 1.0)


def test_layers_of_one_input_count_alike() -> None:
    """A layer with large weights does not decide alone: multiplying it changes nothing."""
    weight, rows = outlier_layer(1, 2, 40.0)
    other, _ = outlier_layer(2, 2, 1.0)
    magnitudes, origins = torch.from_numpy(rows).abs().mean(0), torch.arange(128)

    def result(factor: float) -> tuple[float, float]:
        layers = [torch.from_numpy(weight), torch.from_numpy(other * np.float32(factor))]
        found = search_group(layers, torch.from_numpy(rows), magnitudes, origins, FOUR_BITS)[1]
        return found.exponent, found.error

    assert result(1.0)[0] == result(1024.0)[0]
    assert result(1.0)[1] == pytest.approx(result(1024.0)[1], rel=1e-4)


def test_inputs_of_one_origin_share_a_scale() -> None:
    weight, rows = outlier_layer(3, 4, 50.0)
    origins = torch.arange(64).repeat(2)
    features = torch.from_numpy(rows)
    scales, _ = search_group([torch.from_numpy(weight)], features, features.abs().mean(0), origins, FOUR_BITS)
    assert scales.shape == (64,)
    assert scales.max() > scales.min()


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([4, 8]),
    features=st.sampled_from([32, 96, 128, 200]),
    size=st.sampled_from([32, 128]),
)
@settings(max_examples=40, deadline=None)
def test_rounding_is_the_exporters(seed: int, bits: int, features: int, size: int) -> None:
    """Widths that blocks don't divide are filled up with zeros, as they are when they are stored."""
    weight = np.random.default_rng(seed).standard_normal((6, features)).astype(np.float32)
    weight[2] = 0.0
    rounding = Rounding(4 if bits == 4 else 8, size)
    padded = np.pad(weight, ((0, 0), (0, -features % size)))
    expected = rounded(padded, rounding)[:, :features] - weight
    error = rounding_error(torch.from_numpy(weight), rounding).numpy()
    np.testing.assert_allclose(error, expected, atol=1e-6)


def test_a_dead_channel_gets_a_finite_scale() -> None:
    magnitudes = torch.tensor([0.0, 1.0, 2.0, 100.0])
    for exponent in (0.0, 0.5, 0.95):
        scales = candidate_scales(magnitudes, exponent)
        assert torch.isfinite(scales).all()
        assert (scales > 0).all()
        assert float(scales.max() * scales.min()) == pytest.approx(1.0, rel=1e-4)
    assert torch.isfinite(candidate_scales(torch.zeros(4), 0.5)).all()


@given(seed=st.integers(0, 2**32 - 1), features=st.sampled_from([128, 80]))
@settings(max_examples=20, deadline=None)
def test_clipping_takes_the_ratio_that_brute_force_takes(seed: int, features: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_t(3, (8, features)).astype(np.float32)
    rows = (random.standard_normal((300, features)) * random.uniform(0.2, 3, features)).astype(np.float32)
    scales = random.uniform(0.5, 2, features).astype(np.float32)
    ones = torch.from_numpy(scales)
    chosen = search_clips(torch.from_numpy(weight), ones, torch.from_numpy(rows), FOUR_BITS).numpy()

    filled = ((0, 0), (0, -features % 32))
    blocks = np.pad(weight * scales, filled).reshape(8, -1, 32)
    seen = np.pad(rows / scales, filled).reshape(300, -1, 32).transpose(1, 0, 2)
    errors = []
    for ratio in CLIP_RATIOS:
        limits = np.abs(blocks).max(2, keepdims=True) * np.float32(ratio)
        stored = rounded(blocks.clip(-limits, limits).reshape(8, -1), FOUR_BITS).reshape(blocks.shape)
        outputs = np.einsum("btk,nbk->nbt", seen, stored - blocks)
        errors.append((outputs**2).mean(-1))
    best = np.min(errors, axis=0)
    taken = np.take_along_axis(np.array(errors), chosen[None].astype(np.int64), 0)[0]
    # The factors are damped a little, so a tie may go either way.
    assert (taken <= best * 1.02 + 1e-9).all()
    assert taken.sum() < np.array(errors)[0].sum()


def test_clipped_blocks_are_rounded_with_the_chosen_step() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 80)).astype(np.float32)
    chosen = random.integers(0, len(CLIP_RATIOS), (4, 3)).astype(np.uint8)
    clipped = clip_blocks(weight, chosen)
    assert clipped.shape == weight.shape
    padded = np.pad(weight, ((0, 0), (0, 16))).reshape(4, 3, 32)
    largest = np.abs(padded).max(2) * np.asarray(CLIP_RATIOS, np.float32)[chosen]
    _, steps = quantize_rows(np.pad(clipped, ((0, 0), (0, 16))), 4, 32)
    np.testing.assert_allclose(steps, largest / 7, rtol=1e-6)
    inside = np.abs(padded) <= largest[..., None]
    np.testing.assert_array_equal(
        np.pad(clipped, ((0, 0), (0, 16))).reshape(4, 3, 32)[inside], padded[inside]
    )


def test_query_heads_of_a_group_share_value_channels() -> None:
    shape = TextShape(
        layers=1,
        hidden=8,
        intermediate=8,
        heads=4,
        kv_heads=2,
        head_dim=2,
        vocab=8,
        rope_theta=1e4,
        mrope_section=None,
        max_positions=8,
        tied_embedding=False,
    )
    assert value_channels(shape).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
