# SPDX-License-Identifier: Apache-2.0
"""What the host settles before a compression: budgets, windows, metadata of rows, counters and chance."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import layout

from starkv.errors import UsageError
from starkv.methods.budget import LEAST_ROWS, Budget, pyramid_rows, window_rows
from starkv.methods.expected_information import (
    SPATIAL_BINS,
    VALUE_BINS,
    chance_and_span,
    spatial_cells,
    value_bins,
)
from starkv.methods.rows import (
    NO_FRAME,
    ROW_CELL,
    ROW_FRAME,
    ROW_TOKEN,
    official_rows,
    prompt_rows,
    square_grid,
)
from starkv.methods.star_kv_config import StarKVConfig, official_flags
from starkv.methods.star_kv_plan import StarKVProgress, plan_step
from starkv.methods.star_kv_request import request_star_kv

FLAGS = {
    "kv_group_soft_prior_lambda": 0.5,
    "kv_group_online_profile_steps": 5,
    "kv_group_online_profile_decay": 0.9,
    "kv_group_online_profile_tau": 1.0,
    "kv_group_online_profile_lambda_ramp_steps": 10,
    "alpha": 2.0,
    "temperature": 3.5,
    "window_size": 8,
    "kv_entropy_budget_enable": True,
    "kv_entropy_budget_min_scale": 0.75,
    "kv_entropy_budget_max_scale": 1.25,
    "kv_entropy_budget_smooth": 0.0,
    "kv_group_temporal_enable": True,
    "kv_group_temporal_delta": 0.1,
    "kv_group_temporal_rho": 0.9,
    "kv_group_temporal_eps": 0.0,
    "kv_group_temporal_discount_min": 0.0,
    "kv_group_temporal_warmup_steps": 0,
}
"""Values of the official ``repro_ssp_kv.sh``."""


# --- budgets ---


@given(st.integers(1, 100_000), st.floats(0.001, 1.0))
def test_a_share_is_rounded_down_and_never_exceeds_the_prompt(rows: int, share: float) -> None:
    kept = Budget(share).rows(rows)
    assert kept == min(rows, max(LEAST_ROWS, kept))
    assert kept <= max(LEAST_ROWS, rows * share + 1e-6)
    assert kept > rows * share - 1 - 1e-6 or kept == rows


def test_shares_that_binary_fractions_miss_are_exact() -> None:
    assert [Budget(share).rows(100) for share in (0.29, 0.57, 0.58, 0.2, 1.0)] == [29, 57, 58, 20, 100]


def test_a_capacity_bounds_any_prompt() -> None:
    budget = Budget(0.5, capacity=40)
    assert [budget.rows(rows) for rows in (20, 80, 1000)] == [10, 40, 40]
    assert Budget(capacity=40).spares(39)
    assert not Budget(capacity=40).spares(40)
    assert not Budget().spares(39)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, 20.0, float("nan"), float("inf")])
def test_shares_outside_the_unit_interval_are_refused(share: float) -> None:
    with pytest.raises(UsageError, match=r"a KV budget is a share of the prompt in \(0, 1\]"):
        Budget(share)


@pytest.mark.parametrize("capacity", [1, 0, -5])
def test_capacities_that_hold_no_cache_are_refused(capacity: int) -> None:
    with pytest.raises(UsageError, match="a KV capacity must be at least 2 rows"):
        Budget(capacity=capacity)


@given(st.integers(1, 64), st.integers(2, 1000))
def test_the_window_leaves_rows_to_compete_for(wanted: int, kept: int) -> None:
    window = window_rows(wanted, kept)
    assert 1 <= window <= wanted
    assert window == wanted or window == max(1, kept - 2)


@given(st.integers(1, 40), st.integers(3, 3000), st.floats(0.01, 1.0))
def test_a_pyramid_narrows_and_never_exceeds_the_prompt(layers: int, rows: int, share: float) -> None:
    kept = Budget(share).rows(rows)
    window = window_rows(8, kept)
    pyramid = pyramid_rows(layers, rows, kept, window)
    assert len(pyramid) == layers
    assert all(window < layer <= rows for layer in pyramid)
    assert list(pyramid) == sorted(pyramid, reverse=True)


# --- rows ---


def test_rows_know_their_screenshot_and_their_place_in_it() -> None:
    rows = layout([(2, 3), (3, 2)], tail=4)
    meta = rows.row_meta
    assert rows.spans == ((6, 12), (18, 24))
    assert meta[:, ROW_FRAME].tolist() == [-1] * 6 + [0] * 6 + [-1] * 6 + [1] * 6 + [-1] * 4
    assert meta[6:12, ROW_CELL].tolist() == meta[18:24, ROW_CELL].tolist() == list(range(6))
    assert meta[:, ROW_TOKEN].tolist() == list(range(28))


def test_the_newest_screenshot_loses_what_lies_in_the_window() -> None:
    rows = layout([(2, 3), (3, 2)], tail=4)
    frame = rows.newest_frame(window=6)
    assert (frame.index, frame.rows_to_end, frame.cells, frame.frames_in_view) == (1, 10, 4, 2)
    assert (frame.grid_rows, frame.grid_columns) == (3, 2)
    # A window that covers it all leaves the one before.
    assert rows.newest_frame(window=10).index == 0
    assert rows.newest_frame(window=22) == NO_FRAME
    assert layout([]).newest_frame(4) == NO_FRAME
    assert frame.as_array().tolist() == [1, 10, 4, 3, 2]


@pytest.mark.parametrize(
    ("spans", "grids", "message"),
    [
        ([(3, 3)], [(0, 0)], r"screenshot 0: span \[3, 3\) must be non-empty"),
        ([(5, 11)], [(2, 3)], "inside the prompt of 10 rows"),
        ([(-2, 4)], [(2, 3)], "must be non-empty, behind row 0"),
        ([(0, 6), (5, 9)], [(2, 3), (2, 2)], r"screenshot 1: span \[5, 9\) must be non-empty, behind row 6"),
        ([(0, 6)], [(2, 2)], "6 rows are no grid of 2x2"),
        ([(0, 6)], [], "1 screenshot spans, but 0 grids"),
    ],
)
def test_spans_that_can_not_be_are_refused(
    spans: list[tuple[int, int]], grids: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prompt_rows(10, spans, grids)


def test_official_mode_clamps_spans_instead() -> None:
    rows = official_rows(30, [(-5, 4), (8, 8), (40, 50), (10, 60)], window=6)
    assert rows.spans == ((0, 4), (10, 24))
    assert rows.grids == (square_grid(4), square_grid(14))
    assert rows.row_meta[:, ROW_FRAME].tolist() == [0] * 4 + [-1] * 6 + [1] * 14 + [-1] * 6


@pytest.mark.parametrize(
    ("cells", "grid"), [(1, (1, 1)), (6, (2, 3)), (2691, (52, 52)), (12, (3, 4)), (30, (5, 6))]
)
def test_square_grids_round_as_python_does(cells: int, grid: tuple[int, int]) -> None:
    assert square_grid(cells) == grid


# --- chance ---


@given(st.integers(1, 60), st.integers(1, 60))
def test_cells_are_those_of_the_floating_point_formula(rows: int, columns: int) -> None:
    token = np.arange(rows * columns)
    y, x = (token // columns + 0.5) / rows, (token % columns + 0.5) / columns
    expected = np.floor(12 * y) * SPATIAL_BINS + np.floor(12 * x)
    np.testing.assert_array_equal(spatial_cells(rows * columns, rows, columns), expected)


def information(values: np.ndarray, places: np.ndarray) -> float:
    """Mutual information of two labellings, by counting."""
    joint = np.zeros((VALUE_BINS, SPATIAL_BINS**2))
    np.add.at(joint, (values, places), 1.0)
    joint /= len(values)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    filled = joint > 0
    return float((joint[filled] * np.log(joint[filled] / independent[filled])).sum())


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (14, 20), (39, 69), (20, 31)])
def test_chance_is_the_mean_over_random_orders(rows: int, columns: int) -> None:
    cells = rows * columns
    places, values = spatial_cells(cells, rows, columns), value_bins(cells)
    random = np.random.default_rng(0)
    drawn = [information(random.permutation(values), places) for _ in range(200)]
    error = 4 * np.std(drawn) / np.sqrt(len(drawn)) + 1e-9
    chance, span = chance_and_span(cells, rows, columns)
    assert abs(np.mean(drawn) - chance) < error
    ceiling = information(values, places) if cells <= 144 else np.log(VALUE_BINS)
    assert span <= ceiling - chance + 1e-6


def test_an_order_by_place_reaches_nearly_all_there_is() -> None:
    places, values = spatial_cells(39 * 69, 39, 69), value_bins(39 * 69)
    chance, span = chance_and_span(39 * 69, 39, 69)
    found = information(values, places[np.argsort(places, kind="stable")])
    assert 0.85 < (found - chance) / span <= 1.0


@pytest.mark.parametrize("cells", [0, 1])
def test_less_than_two_tokens_tell_nothing(cells: int) -> None:
    assert chance_and_span(cells, 1, 1) == (0.0, 0.0)


# --- counters ---


def weights_of(config: StarKVConfig, steps: int) -> list[float]:
    progress, weights = StarKVProgress(), []
    frame = layout([(14, 20)]).newest_frame(8)
    for _ in range(steps):
        plan, progress = plan_step(config, progress, frame)
        weights.append(plan.mi_weight)
    return weights


def test_the_prior_ramps_up_after_profiling() -> None:
    paper = weights_of(StarKVConfig.official(), 18)
    assert paper[:5] == [0.0] * 5
    np.testing.assert_allclose(paper[5:15], 0.05 * np.arange(1, 11))
    assert paper[15:] == [0.5] * 3
    assert weights_of(StarKVConfig(), 3) == [0.5] * 3


def test_averages_start_as_their_first_value() -> None:
    config = StarKVConfig.official(entropy_smooth=0.5)
    one, two = layout([(14, 20)]).newest_frame(8), layout([(9, 9), (14, 20)]).newest_frame(8)
    other_size = layout([(9, 9), (14, 21)]).newest_frame(8)
    progress = StarKVProgress()
    first, progress = plan_step(config, progress, one)
    assert (first.mi_decay, first.temporal_update, first.entropy_smooth) == (0.0, False, 0.0)
    second, progress = plan_step(config, progress, two)
    assert (second.mi_decay, second.temporal_rho, second.entropy_smooth) == (0.9, 0.0, 0.5)
    third, progress = plan_step(config, progress, two)
    assert third.temporal_rho == 0.9
    fourth, _ = plan_step(config, progress, other_size)
    assert fourth.temporal_rho == 0.0
    # A new sample forgets all but the temperature (spec star-kv.md §8, the reset bug).
    fresh, _ = plan_step(config, progress.next_sample(), two)
    assert (fresh.mi_decay, fresh.temporal_rho, fresh.entropy_smooth) == (0.0, 0.0, 0.5)


def test_warm_up_observes_without_discounting() -> None:
    config = StarKVConfig.official(temporal_warmup=2)
    frame, progress = layout([(9, 9), (14, 20)]).newest_frame(8), StarKVProgress()
    applied = []
    for _ in range(4):
        plan, progress = plan_step(config, progress, frame)
        assert plan.temporal_update
        applied.append(plan.temporal_apply)
    assert applied == [False, False, True, True]


def test_official_flags_read_zeros_as_the_official_code_does() -> None:
    assert official_flags(FLAGS) == StarKVConfig.official()
    zeros = dict.fromkeys(
        (
            "kv_group_soft_prior_lambda",
            "kv_group_online_profile_decay",
            "kv_group_online_profile_tau",
            "kv_group_online_profile_lambda_ramp_steps",
            "temperature",
        ),
        0,
    )
    quirky = official_flags(FLAGS | zeros)
    assert (quirky.mi_weight, quirky.mi_decay, quirky.mi_tau) == (0.5, 0.9, 1.0)
    assert (quirky.mi_ramp_steps, quirky.boost_temperature) == (5, 1.0)
    assert not official_flags(FLAGS | {"kv_group_online_profile_steps": 0}).mi
    assert official_flags(FLAGS | {"alpha": None}).boost == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"boost_temperature": 0.0}, "boost_temperature must be above 0"),
        ({"mi_weight": 1.5}, r"mi_weight must lie in \[0, 1\]"),
        ({"entropy_min": 2.0}, "entropy_min and entropy_max must be positive and in order"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(StarKVConfig(), **change)
    with pytest.raises(UsageError, match="unknown STaR-KV mode 'fast'; known: native, official"):
        StarKVConfig.of_mode("fast")


@given(st.integers(3, 3000), st.floats(0.01, 1.0), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_prompt_and_budget_can_be_settled(rows: int, share: float, official: bool) -> None:
    side = int(np.sqrt(rows // 2))
    grids = [(side, side)] if side > 1 else []
    prompt = prompt_rows(rows, [(1, 1 + side * side)] if grids else [], grids, range(min(rows, 40)))
    kept = Budget(share).rows(rows)
    config = StarKVConfig.of_mode("official" if official else "native")
    request = request_star_kv(config, prompt, kept, StarKVProgress(), 64)
    limits = request.limits
    assert 1 <= limits.floor <= limits.mean <= limits.ceiling <= rows - request.window
    assert request.window + limits.mean == max(kept, request.window + 1)
    assert len(request.protected) <= limits.floor
    assert json.dumps(request.plan.as_array().tolist())


def test_a_window_longer_than_the_decoder_puts_out_is_refused() -> None:
    with pytest.raises(UsageError, match="window of 128 rows is asked for, but the engine was exported with"):
        request_star_kv(replace(StarKVConfig(), window=128), layout([]), 10, StarKVProgress(), 64)
