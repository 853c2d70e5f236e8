# SPDX-License-Identifier: Apache-2.0
"""Quantized rows of full rank, on keys with biases as large as Qwen2's: the bias taken out, they stay
right."""

import dataclasses

import numpy as np
import pytest
from lowrank_cases import Case, dense, make_case

from starkv.lowrank.attend import attend_quantized
from starkv.lowrank.quantized_rows import Bits, RowQuantization, key_bias_logits, row_quantization
from starkv.lowrank.rotary import rotate
from starkv.lowrank.statistics import LayerStatistics, StatisticsAccumulator

BIASED = 200.0


def statistics(case: Case) -> LayerStatistics:
    accumulator = StatisticsAccumulator(*case.key_bias.shape)
    accumulator.add(case.plain_keys, case.plain_values, *case.tables)
    accumulator.add_queries(case.queries[None])
    return accumulator.finish()


def quantization_of(case: Case, bits: Bits, clip: float | None = None) -> RowQuantization:
    return row_quantization(statistics(case), bits, case.key_bias, case.value_bias, clip)


@pytest.mark.parametrize("components", [1, 3])
def test_three_tables_are_the_rotated_bias(components: int) -> None:
    case = make_case(bias_peak=BIASED, components=components)
    cosines, sines = case.tables
    bias = rotate(case.key_bias, cosines[:, None], sines[:, None])
    expected, _ = dense(case.queries, np.broadcast_to(bias, case.keys.shape), case.values)
    logits = key_bias_logits(case.queries, case.key_bias, case.positions, case.rotary)
    np.testing.assert_allclose(logits * case.key_bias.shape[1] ** -0.5, expected, atol=1e-9)


def plain_per_tensor(case: Case, bits: Bits) -> np.ndarray:
    """Keys as a cache with one scale and the bias left in holds them."""
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(case.keys).max() / largest
    return np.rint(case.keys / scale) * scale


@pytest.mark.parametrize(("bits", "ours", "ruined"), [(8, 0.01, 0.15), (4, 0.15, 0.9)])
def test_the_key_bias_ruins_plain_low_bit_keys_but_not_ours(bits: Bits, ours: float, ruined: float) -> None:
    case = make_case(rows=120, bias_peak=BIASED)
    quantization = quantization_of(case, bits)
    rows = quantization.quantize(case.keys, case.values, case.positions, case.rotary)
    attended = attend_quantized(case.queries, rows, case.tail(slice(0, 0)), quantization, case.rotary)
    exact, exact_heads = dense(case.queries, case.keys, case.values)
    plain, plain_heads = dense(case.queries, plain_per_tensor(case, bits), case.values)
    head_dim = case.key_bias.shape[1]
    by_bias = key_bias_logits(case.queries, case.key_bias, case.positions, case.rotary) * head_dim**-0.5

    def lost(logits: np.ndarray) -> float:
        """Error against what tells tokens apart: the logits' spread without the bias's share."""
        return float(((logits - exact).std(axis=-1) / (exact - by_bias).std(axis=-1)).mean())

    assert lost(plain) > ruined
    assert lost(attended.logits) < ours
    assert np.abs(attended.heads - exact_heads).mean() < 0.5 * np.abs(plain_heads - exact_heads).mean()


@pytest.mark.parametrize("split", [0, 50, 120])
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.2)])
def test_a_raw_tail_shares_the_softmax(bits: Bits, bound: float, split: int) -> None:
    case = make_case(rows=120, bias_peak=BIASED)
    quantization = quantization_of(case, bits)
    rows = quantization.quantize(case.keys[:split], case.values[:split], case.positions[:split], case.rotary)
    attended = attend_quantized(case.queries, rows, case.tail(slice(split, None)), quantization, case.rotary)
    logits, heads = dense(case.queries, case.keys, case.values)
    np.testing.assert_allclose(attended.logits[:, split:], logits[:, split:], atol=1e-9)
    difference = np.abs(attended.logits - logits)
    assert difference.mean() < bound
    if split == 0:
        np.testing.assert_allclose(attended.heads, heads, atol=1e-9)


def test_only_valid_rows_count() -> None:
    case = make_case(rows=80)
    quantization = quantization_of(case, 8)
    rows = quantization.quantize(case.keys, case.values, case.positions, case.rotary)
    some = quantization.quantize(case.keys[:50], case.values[:50], case.positions[:50], case.rotary)
    tail = case.tail(slice(70, None))
    expected = attend_quantized(case.queries, some, tail, quantization, case.rotary)
    attended = attend_quantized(case.queries, rows, tail, quantization, case.rotary, valid=50)
    np.testing.assert_array_equal(attended.heads, expected.heads)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_lie_as_documented(bits: Bits) -> None:
    case = make_case(rows=70)
    quantization = quantization_of(case, bits)
    rows = quantization.quantize(case.keys, case.values, case.positions, case.rotary)
    assert rows.keys.nbytes + rows.values.nbytes == len(case.keys) * quantization.bytes_per_row
    exact = case.plain_values[5, 1] / quantization.value_scales[1]
    if bits == 8:
        assert rows.values.dtype == np.int8
        np.testing.assert_array_equal(rows.values[5, 1], np.rint(exact))
    else:
        assert rows.values.dtype == np.uint8
        np.testing.assert_array_equal(rows.values[5, 1] & 15, np.rint(exact[0::2]) + 8)
        np.testing.assert_array_equal(rows.values[5, 1] >> 4, np.rint(exact[1::2]) + 8)
    steps = np.abs(quantization.stored_values(rows) - case.plain_values) / quantization.value_scales
    assert steps.max() <= 0.5 + 1e-4


def test_what_lies_beyond_the_scale_is_clipped() -> None:
    case = make_case(rows=70)
    quantization = quantization_of(case, 4)
    rows = quantization.quantize(case.keys, 100 * case.values, case.positions, case.rotary)
    stored = quantization.stored_values(rows) / quantization.value_scales
    assert stored.min() == pytest.approx(-8)
    assert stored.max() == pytest.approx(7)


def test_clipping_rare_values_pays_with_four_bits() -> None:
    rng = np.random.default_rng(0)
    case = make_case(rows=4000, bias_peak=BIASED)
    case = dataclasses.replace(case, values=rng.normal(size=case.values.shape) + case.value_bias)

    def error(bits: Bits, clip: float | None) -> float:
        quantization = quantization_of(case, bits, clip)
        rows = quantization.quantize(case.keys, case.values, case.positions, case.rotary)
        return float(np.square(quantization.stored_values(rows) - case.plain_values).mean() ** 0.5)

    assert error(4, 2.7) < 0.8 * error(4, None)
    assert error(8, 2.7) > error(8, None)


def test_a_channel_of_zeros_has_a_scale() -> None:
    case = make_case(rows=70)
    measured = dataclasses.replace(statistics(case), key_peaks=np.zeros((2, 16)))
    scales = row_quantization(measured, 8, case.key_bias, case.value_bias).key_scales
    np.testing.assert_allclose(scales, 1e-5 / 127)


def test_a_rotary_pair_has_one_scale() -> None:
    case = make_case(rows=70)
    quantization = quantization_of(case, 8)
    np.testing.assert_array_equal(quantization.key_scales[:, :16], quantization.key_scales[:, 16:])
    scales = quantization.key_scales.copy()
    scales[0, 3] *= 2
    with pytest.raises(ValueError, match="same scale"):
        dataclasses.replace(quantization, key_scales=scales)
