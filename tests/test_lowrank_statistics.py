# SPDX-License-Identifier: Apache-2.0
"""Streaming statistics equal those of all tokens at once; bad ones are refused."""

import dataclasses

import numpy as np
import pytest
from lowrank_cases import Case, make_case, moment

from starkv.errors import CalibrationError, UsageError
from starkv.lowrank.rotary import Rotary, rotate, unrotate
from starkv.lowrank.statistics import LayerStatistics, StatisticsAccumulator, mix

KV_HEADS, GROUP, HEAD_DIM = 4, 3, 8


def queries_of(case: Case) -> np.ndarray:
    """Fewer than there are tokens, as only the last ones of a prompt are scored by."""
    return np.random.default_rng(5).normal(size=(len(case.keys) // 3, KV_HEADS * GROUP, HEAD_DIM))


def gather(case: Case, batches: int, heads_per_group: int = 1) -> LayerStatistics:
    accumulator = StatisticsAccumulator(KV_HEADS, HEAD_DIM, heads_per_group)
    arrays = (case.plain_keys, case.plain_values, *case.tables)
    for batch in zip(*(np.array_split(array, batches) for array in arrays), strict=True):
        accumulator.add(*batch)
    for queries in np.array_split(queries_of(case), batches):
        accumulator.add_queries(queries)
    assert accumulator.tokens == len(case.keys)
    return accumulator.finish()


def make(seed: int = 0) -> Case:
    return make_case(rows=90, kv_heads=KV_HEADS, group=GROUP, head_dim=HEAD_DIM, seed=seed)


@pytest.mark.parametrize("heads_per_group", [1, 2, 4])
@pytest.mark.parametrize("batches", [1, 7])
def test_batches_add_up(heads_per_group: int, batches: int) -> None:
    case = make()
    statistics = gather(case, batches, heads_per_group)
    flat = case.plain_keys.reshape(90, -1)
    for group, expected in enumerate(np.split(flat, KV_HEADS // heads_per_group, axis=1)):
        np.testing.assert_allclose(statistics.key_moments[group], moment(expected))
    np.testing.assert_allclose(statistics.value_moment, moment(case.plain_values.reshape(90, -1)))
    assert statistics.tokens == 90

    queries = queries_of(case)
    for kv_head in range(KV_HEADS):
        own = queries[:, kv_head * GROUP : (kv_head + 1) * GROUP]
        expected = (own[..., :4] ** 2 + own[..., 4:] ** 2).mean(axis=(0, 1)) / 2
        np.testing.assert_allclose(statistics.query_energies[kv_head], expected)

    cosines, sines = case.tables
    without_bias = case.keys - rotate(case.key_bias, cosines[:, None], sines[:, None])
    peaks = np.abs(without_bias).max(axis=0)
    np.testing.assert_allclose(statistics.key_peaks, np.maximum(peaks[:, :4], peaks[:, 4:]))
    np.testing.assert_allclose(statistics.value_peaks, np.abs(case.plain_values).max(axis=0))
    both = (without_bias[..., :4] ** 2 + without_bias[..., 4:] ** 2) / 2
    np.testing.assert_allclose(statistics.key_deviations, np.sqrt(both.mean(axis=0)))
    np.testing.assert_allclose(statistics.value_deviations, np.sqrt((case.plain_values**2).mean(axis=0)))


def test_kinds_mix_by_weight() -> None:
    visual, text = gather(make(0), 1), gather(make(1), 1)
    mixed = mix(visual, text, 0.25)
    np.testing.assert_allclose(mixed.value_moment, 0.25 * visual.value_moment + 0.75 * text.value_moment)
    np.testing.assert_array_equal(mixed.key_peaks, np.maximum(visual.key_peaks, text.key_peaks))
    for field in dataclasses.fields(LayerStatistics):
        if field.name in ("key_moments", "value_moment", "query_energies"):
            np.testing.assert_array_equal(
                getattr(mix(visual, text, 1.0), field.name), getattr(visual, field.name)
            )
    with pytest.raises(UsageError, match=r"\[0, 1\], not 1.5"):
        mix(visual, text, 1.5)


def test_too_few_tokens() -> None:
    case = make_case(rows=31, kv_heads=KV_HEADS, group=GROUP, head_dim=HEAD_DIM)
    with pytest.raises(CalibrationError, match="saw 31 tokens of a kind, but statistics of 32 channels"):
        gather(case, 1)


def test_no_queries() -> None:
    case = make()
    accumulator = StatisticsAccumulator(KV_HEADS, HEAD_DIM)
    accumulator.add(case.plain_keys, case.plain_values, *case.tables)
    with pytest.raises(CalibrationError, match="no queries"):
        accumulator.finish()


@pytest.mark.parametrize("part", ["key", "value", "query"])
def test_numbers_that_are_none(part: str) -> None:
    case = make()
    arrays = {"key": case.plain_keys, "value": case.plain_values, "query": queries_of(case)}
    arrays[part][3, 1, 2] = np.nan
    accumulator = StatisticsAccumulator(KV_HEADS, HEAD_DIM)
    with pytest.raises(CalibrationError, match=f"a {part} projection put out values that are not finite"):
        add_all(accumulator, arrays["key"], arrays["value"], arrays["query"], case)


def add_all(
    accumulator: StatisticsAccumulator, keys: np.ndarray, values: np.ndarray, queries: np.ndarray, case: Case
) -> None:
    accumulator.add(keys, values, *case.tables)
    accumulator.add_queries(queries)


def test_heads_that_no_group_divides() -> None:
    with pytest.raises(UsageError, match="4 KV heads can't be divided into groups of 3"):
        StatisticsAccumulator(KV_HEADS, HEAD_DIM, 3)


def test_rotation_is_undone() -> None:
    case = make()
    cosines, sines = (table[:, None] for table in case.tables)
    back = unrotate(rotate(case.keys, cosines, sines), cosines, sines)
    np.testing.assert_allclose(back, case.keys, atol=1e-12)


def test_sections_read_their_component() -> None:
    rotary = Rotary(np.ones(4), (1, 2, 1))
    cosines, sines = rotary.tables(np.array([[1, 2, 3]]))
    np.testing.assert_allclose(cosines, np.cos([[1, 2, 2, 3]]))
    np.testing.assert_allclose(sines, np.sin([[1, 2, 2, 3]]))
    with pytest.raises(ValueError, match="don't cover 4 pairs"):
        Rotary(np.ones(4), (1, 2))
