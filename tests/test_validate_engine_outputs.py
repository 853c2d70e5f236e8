# SPDX-License-Identifier: Apache-2.0
"""How far outputs are apart, and what is made of it."""

import numpy as np
import pytest

from starkv.cli.engine_tolerances import float32_tolerances, rounded_tolerances
from starkv.validation.outputs import (
    ANYTHING,
    NONE,
    Deviation,
    deviation,
    share_of_equal,
    summaries,
    summary,
)

RIGHT = np.random.default_rng(6).standard_normal((4, 100, 64)).astype(np.float32)


def noisy(size: float) -> np.ndarray:
    noise = np.random.default_rng(7).standard_normal(RIGHT.shape)
    return (RIGHT * (1 + size * noise)).astype(np.float32)


def test_equal_tensors_are_no_distance_apart() -> None:
    assert deviation(RIGHT, RIGHT) == NONE
    assert deviation(np.zeros((2, 3)), np.zeros((2, 3))) == NONE


def test_noise_shows_in_all_measures_alike() -> None:
    found = deviation(RIGHT, noisy(0.01))
    assert found.total == pytest.approx(0.01, rel=0.05)
    assert found.typical == pytest.approx(0.01, rel=0.2)
    assert 0.01 < found.largest < 0.05


def test_one_wrong_number_shows_in_the_largest() -> None:
    wrong = RIGHT.copy()
    wrong[2, 50, 3] += 3.0
    found, noise = deviation(RIGHT, wrong), deviation(RIGHT, noisy(0.01))
    assert found.typical == 0.0
    assert found.largest > 10 * noise.largest
    assert found.total < 2.5 * noise.total


def test_what_is_wrong_everywhere_shows_in_the_typical_row_beside_a_row_that_turned() -> None:
    turned, wrong = noisy(0.01), noisy(0.03)
    turned[0, 0] = -RIGHT[0, 0]
    wrong[0, 0] = -RIGHT[0, 0]
    right, found = deviation(RIGHT, turned), deviation(RIGHT, wrong)
    assert found.largest == pytest.approx(right.largest)
    assert found.total < 1.5 * right.total
    assert found.typical > 2.5 * right.typical


def test_rows_that_should_be_zero_count_where_they_have_a_size() -> None:
    right = np.stack([np.zeros(8), np.ones(8)])
    wrong = np.stack([np.ones(8), np.ones(8)])
    assert deviation(right, wrong) == Deviation(1.0, 1.0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_beyond_every_bound(value: float) -> None:
    wrong = RIGHT.copy()
    wrong[0, 0, 0] = value
    assert deviation(RIGHT, wrong) == ANYTHING
    assert deviation(RIGHT, wrong).beyond(Deviation(1.0, 1.0, 1.0)) == ["largest", "total", "typical"]
    assert deviation(RIGHT, RIGHT[:3]) == ANYTHING
    nothing = Deviation(np.nan, 0.0, 0.0)
    assert nothing.beyond(Deviation(1.0, 1.0, 1.0)) == ["largest"]


def test_prompts_are_summed_up_by_tensor_and_replies_by_all_their_tokens() -> None:
    expected = [{"keys.0": RIGHT, "decode.0": RIGHT, "decode.1": RIGHT}, {"keys.0": RIGHT}]
    actual = [{"keys.0": RIGHT, "decode.0": noisy(0.01), "decode.1": noisy(0.03)}, {"keys.0": noisy(0.01)}]
    found = summaries(expected, actual)
    assert found.keys() == {"keys.0", "decode"}
    assert found["keys.0"] == summary([NONE, deviation(RIGHT, noisy(0.01))])
    assert found["decode"].largest == deviation(RIGHT, noisy(0.03)).largest
    assert found["decode"].total == pytest.approx(0.02, rel=0.1)
    assert summaries(expected[1:], [{}])["keys.0"] == ANYTHING


def test_shares_of_rows_count_those_of_the_reference() -> None:
    flags = np.array([[True, True, False, False]])
    assert share_of_equal(flags, np.array([[True, False, True, True]])) == 0.5
    assert share_of_equal(np.array([3, 4]), np.array([3, 5])) == 0.5
    assert share_of_equal(np.array([3, 4]), np.array([3])) == 0.0


def test_bounds_are_multiples_of_what_rounding_did() -> None:
    rounded = {"keys.3": Deviation(0.02, 0.01, 0.005), "decode": Deviation(0.02, 0.01, 0.005)}
    bounds = rounded_tolerances(rounded, kept_rows=0.99, tokens=0.98, token_count=68)
    keys, reply = bounds.of("keys.3"), bounds.of("decode")
    assert keys is not None
    assert reply is not None
    assert 0.15 < keys.largest < 0.17
    assert 0.030 < keys.total < 0.031
    assert 0.012 < keys.typical < 0.013
    # A token that wavers makes the largest one of a reply, and all that a row has.
    assert reply == Deviation(1.0, keys.total, keys.total)
    assert 0.9 < bounds.kept_rows < 0.97
    assert 0.8 < bounds.tokens < 0.9
    assert bounds.of("values.0") == float32_tolerances().of("values.0")


def test_no_rounding_excuses_what_is_off_by_its_own_size() -> None:
    bounds = rounded_tolerances({"keys.0": ANYTHING}).of("keys.0")
    assert bounds == Deviation(1.0, 1.0, 1.0)
