# SPDX-License-Identifier: Apache-2.0
"""Sampling and stop strings."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from starkv.errors import UsageError
from starkv.runtime.generation import Sampler, SamplingParameters, StopScanner

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def draws(parameters: SamplingParameters, logits: np.ndarray = LOGITS, count: int = 4000) -> np.ndarray:
    """How often each token is drawn, as a share."""
    sampler = Sampler(parameters)
    picked = [sampler.pick(logits) for _ in range(count)]
    return np.bincount(picked, minlength=len(logits)) / count


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20))
def test_greedy_takes_the_first_of_the_best(values: list[float]) -> None:
    assert Sampler(SamplingParameters()).pick(np.array(values, np.float32)) == values.index(max(values))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probability(temperature: float) -> None:
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    shares = draws(SamplingParameters(temperature=temperature, seed=1))
    # Four standard deviations of a share of 4,000 draws.
    assert np.abs(shares - expected).max() < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("top_p", "nucleus"), [(0.39, [1]), (0.41, [1, 3]), (0.71, [1, 2, 3]), (0.91, [0, 1, 2, 3])]
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, nucleus: list[int]) -> None:
    shares = draws(SamplingParameters(temperature=1.0, top_p=top_p, seed=2))
    assert np.flatnonzero(shares).tolist() == nucleus
    expected = np.exp(LOGITS[nucleus]) / np.exp(LOGITS[nucleus]).sum()
    assert np.abs(shares[nucleus] - expected).max() < 0.04


@example([0.0, 1e-45], 0.25, 1.0, 0)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12),
    st.floats(1e-3, 1.0),
    st.floats(1e-2, 10),
    st.integers(0, 2**32),
)
def test_no_token_outside_the_nucleus_is_drawn(
    values: list[float], top_p: float, temperature: float, seed: int
) -> None:
    logits = np.array(values, np.float32)
    token = Sampler(SamplingParameters(temperature=temperature, top_p=top_p, seed=seed)).pick(logits)
    scaled = logits.astype(np.float64) / temperature
    shares = np.exp(scaled - scaled.max())
    # Logits that differ by less than an exponential can show are equally likely.
    likelier = shares[shares > shares[token]].sum() / shares.sum()
    assert likelier < top_p + 1e-9


def test_a_seed_repeats_the_reply_and_no_seed_does_not() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParameters(temperature=1.0, seed=seed))
        return [sampler.pick(np.zeros(1000, np.float32)) for _ in range(10)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(None) != run(None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-8])
def test_the_smallest_temperatures_are_nearly_greedy(temperature: float) -> None:
    assert Sampler(SamplingParameters(temperature=temperature)).pick(LOGITS * 100) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"seed": -1},
        {"stop": ("END", "")},
    ],
)
def test_senseless_parameters_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("stop", "stop string")):
        SamplingParameters(**wrong)  # type: ignore[arg-type]


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest of those that end together."""
    for end in range(len(text) + 1):
        ending = [word for word in stop if text[:end].endswith(word)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


# Few letters make overlaps likely.
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_any_cutting_finds_the_same_stop(pieces: list[str], stop: list[str]) -> None:
    scanner, said = StopScanner(stop), ""
    expected, stops = cut("".join(pieces), stop)
    for piece in pieces:
        said += scanner.push(piece)
        assert expected.startswith(said), "gave out what the stop string takes back"
        if scanner.stopped:
            break
    assert scanner.stopped == stops
    assert said + scanner.finish() == expected


def test_text_that_can_not_become_a_stop_string_comes_at_once() -> None:
    scanner = StopScanner(["END"])
    assert [scanner.push(piece) for piece in ("click", "E", "N", "T", "EN")] == ["click", "", "", "ENT", ""]
    assert scanner.finish() == "EN"
    assert not scanner.stopped


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopScanner([]).push("anything") == "anything"
