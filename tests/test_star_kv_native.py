# SPDX-License-Identifier: Apache-2.0
"""What native mode changes about STaR-KV, one change at a time, and what each mends."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kv_cases import Shape, layout, random_prefill

from starkv.methods import star_kv_stages as stages
from starkv.methods.expected_information import VALUE_BINS, chance_and_span
from starkv.methods.prefill import Prefill
from starkv.methods.rows import square_grid
from starkv.methods.star_kv import compress, score
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_plan import StarKVProgress, plan_step
from starkv.methods.star_kv_state import StarKVState

OFFICIAL, NATIVE = StarKVConfig.official(), StarKVConfig()
SCREEN = (39, 69)
"""Tokens of a 1080p screenshot."""
TWO_FRAMES = layout([(9, 16), (14, 20)])


def initial(prefill: Prefill) -> StarKVState:
    return StarKVState.initial(len(prefill.keys), 1, prefill.keys.shape[2])


# --- true grids ---


def spot(rows: int, columns: int, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """Scores of a screen on which one box is looked at: distinct values, those inside higher."""
    random = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    random[top : top + height, left : left + width] += 1.0
    return random.flatten()


def test_the_square_grid_smears_what_the_true_grid_sees() -> None:
    """Rows of 69 tokens read as rows of 52: a narrow column on the screen becomes a diagonal haze."""
    narrow = spot(*SCREEN, top=0, left=60, height=39, width=5)
    true = stages.spatial_information(narrow, *SCREEN)
    square = stages.spatial_information(narrow, *square_grid(narrow.numel()))
    chance, _ = chance_and_span(narrow.numel(), *SCREEN)
    square_chance, _ = chance_and_span(narrow.numel(), *square_grid(narrow.numel()))
    assert float(true) - chance > 1.5 * (float(square) - square_chance)


def test_native_mode_takes_the_grid_that_the_image_has() -> None:
    prefill = random_prefill(layout([(14, 22)]))
    official = random_prefill(layout([(14, 22)]), official=True)
    assert (prefill.frame.grid_rows, prefill.frame.grid_columns) == (14, 22)
    assert (official.frame.grid_rows, official.frame.grid_columns) == (18, 18)


# --- information without bias, and no stretching of noise ---


def shuffled(count: int, seed: int) -> torch.Tensor:
    return torch.rand(4, count, generator=torch.Generator().manual_seed(seed))


def test_noise_has_no_adjusted_information() -> None:
    cells = SCREEN[0] * SCREEN[1]
    plug_in = stages.spatial_information(shuffled(cells, 0), *SCREEN)
    chance, span = chance_and_span(cells, *SCREEN)
    assert plug_in.mean() > 0.3
    assert ((plug_in - chance) / span).abs().max() < 0.02


def test_small_screens_saturate_the_plug_in_estimate() -> None:
    """Each token in a cell of its own: any order at all shows the most information there can be."""
    plug_in = stages.spatial_information(shuffled(144, 1), 12, 12)
    torch.testing.assert_close(plug_in, torch.full((4,), float(np.log(VALUE_BINS))), rtol=1e-5, atol=0)
    assert chance_and_span(144, 12, 12)[1] == 0.0


def weights_after(config: StarKVConfig, prefill: Prefill) -> torch.Tensor:
    """Weights of the groups after enough prompts of noise that the prior counts fully."""
    steps = config.mi_profile_steps + config.mi_ramp_steps
    state = initial(prefill)
    for _ in range(steps):
        scores, state = score(prefill, state, config)
    assert scores.mi_weight == pytest.approx(config.mi_weight)
    return scores.weights


def test_noise_does_not_tilt_the_groups() -> None:
    """The official weights of two groups are 0.73 and 0.27 whatever the difference between them is."""
    noise, sizes = layout([SCREEN]), Shape(layers=4)
    prefill = random_prefill(noise, shape=sizes, seed=3)
    official = weights_after(OFFICIAL, random_prefill(noise, shape=sizes, seed=3, official=True))
    assert ((official.amax(-1) / official.amin(-1)) - np.e).abs().max() < 1e-3
    native = weights_after(NATIVE, prefill)
    assert (native.amax(-1) / native.amin(-1)).max() < 1.2


def test_a_group_that_looks_at_a_place_gets_weight() -> None:
    cells = SCREEN[0] * SCREEN[1]
    looking = torch.stack([spot(*SCREEN, top=10, left=20, height=12, width=18), shuffled(cells, 5)[0]])
    chance, span = chance_and_span(cells, *SCREEN)
    adjusted = (stages.spatial_information(looking, *SCREEN) - chance).clamp(min=0) / span
    assert adjusted[0] > 0.05 > 0.01 > adjusted[1]
    weights = stages.group_weights(adjusted[None, None], NATIVE.mi_tau, stretch=False)
    assert weights[0, 0, 0] > 1.5 * weights[0, 0, 1]


def test_information_is_not_worked_out_where_it_can_not_count() -> None:
    for grid, config, wanted in (
        ((14, 20), NATIVE, True),
        ((12, 12), NATIVE, False),  # 144 tokens: chance alone reaches all of it
        ((14, 20), replace(NATIVE, mi_weight=0.0), False),
        ((12, 12), replace(NATIVE, skip_idle_mi=False), True),
        ((12, 12), OFFICIAL, True),
    ):
        plan, _ = plan_step(config, StarKVProgress(), random_prefill(layout([grid])).frame)
        assert plan.mi_enabled is wanted, (grid, config)


# --- a discount that follows the abstract ---


def trajectory(config: StarKVConfig, prompts: list[Prefill]) -> list[torch.Tensor]:
    """Discount of every row in each prompt of a trajectory."""
    state, discounts = initial(prompts[0]), []
    for prefill in prompts:
        scores, state = score(prefill, state, config)
        assert scores.discount is not None
        discounts.append(scores.discount)
    return discounts


def test_history_is_not_discounted_before_anything_was_seen_twice() -> None:
    """The official average contains the pattern it is compared with, so the first comparison is always
    perfect."""
    prompt = random_prefill(TWO_FRAMES)
    old = prompt.row_frame == 0
    official = trajectory(replace(NATIVE, temporal_reference="updated"), [prompt])[0]
    torch.testing.assert_close(official[old], torch.full_like(official[old], float(np.exp(-0.1))))
    native = trajectory(NATIVE, [prompt])[0]
    assert (native == 1.0).all()


def test_persistent_attention_discounts_history_and_changing_attention_does_not() -> None:
    same, other = random_prefill(TWO_FRAMES, seed=0), random_prefill(TWO_FRAMES, seed=1)
    old = same.row_frame == 0
    persistent = trajectory(NATIVE, [same, same])[1]
    torch.testing.assert_close(persistent[old], torch.full_like(persistent[old], float(np.exp(-0.1))))
    assert (persistent[~old] == 1.0).all()
    changed = trajectory(NATIVE, [same, other])[1]
    assert (changed[old] > persistent[old]).all()
    # The official comparison, which contains the pattern itself, sees less of the change where it forgets
    # fast.
    forgetful = replace(NATIVE, temporal_rho=0.3)
    updated = trajectory(replace(forgetful, temporal_reference="updated"), [same, other])[1]
    assert (updated[old] < trajectory(forgetful, [same, other])[1][old]).all()


# --- an entropy step that acts ---


@given(st.floats(0.2, 3.0), st.floats(0.2, 3.0), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_the_official_entropy_temperature_changes_no_kept_set(least: float, most: float, seed: int) -> None:
    """x^(1/T) is monotone and comes last, so no range of temperatures evicts another row."""
    prefill = random_prefill(TWO_FRAMES, official=True, seed=seed, shape=Shape(layers=1))
    length = prefill.keys.shape[3]
    rows = []
    for config in (
        replace(OFFICIAL, entropy=False),
        replace(OFFICIAL, entropy_min=min(least, most), entropy_max=max(least, most)),
    ):
        kept, _, _ = compress(prefill, initial(prefill), config, 80, length)
        assert kept is not None
        rows.append(kept.rows)
    assert torch.equal(*rows)


def uneven_layers() -> Prefill:
    """Six layers, the first with attention on few rows, the last with attention all over."""
    prefill = random_prefill(layout([(16, 24)]), shape=Shape(layers=6), seed=2)
    sharpness = torch.tensor([6.0, 3.0, 2.0, 1.0, 0.5, 0.1])[:, None, None, None, None]
    return replace(prefill, queries=prefill.queries * sharpness, hidden_norm=None)


def coverage(prefill: Prefill, config: StarKVConfig, rows: int) -> tuple[list[int], torch.Tensor]:
    """Rows that each layer keeps, and their number relative to what its scores are spread over."""
    kept, scores, _ = compress(prefill, initial(prefill), config, rows, prefill.keys.shape[3])
    assert kept is not None
    assert scores is not None
    needed = stages.effective_rows(scores.entropy, prefill.past)[:, 0]
    return kept.kv_len[:, 0].tolist(), (kept.kv_len[:, 0] - prefill.window) / needed


def test_layers_with_spread_scores_get_rows_from_concentrated_ones() -> None:
    prefill = uneven_layers()
    for rows in (40, 80, 160):
        equal, uniform = coverage(prefill, replace(NATIVE, entropy=False), rows)
        moved, adaptive = coverage(prefill, NATIVE, rows)
        assert equal == [rows] * 6
        assert sum(moved) == 6 * rows
        assert all(later >= earlier - 1 for earlier, later in pairwise(moved))
        assert moved[0] < rows < moved[-1]
        # The layer that lacks most is the one that is helped.
        assert adaptive.min() > 1.1 * uniform.min()


def test_effective_rows_count_what_scores_are_spread_over() -> None:
    past = torch.tensor([[100], [100], [1]])
    scores = torch.zeros(3, 1, 100)
    scores[0] = 1.0
    scores[1, :, :7] = 3.0
    scores[2, :, 0] = 1.0
    needed = stages.effective_rows(stages.normalized_entropy(scores, past), past)
    torch.testing.assert_close(needed, torch.tensor([[100.0], [7.0], [1.0]]), rtol=1e-4, atol=0)


@given(
    st.lists(st.floats(1.0, 1e4), min_size=1, max_size=40),
    st.integers(1, 3000),
    st.floats(0.0, 1.0),
    st.floats(1.0, 3.0),
)
@example([1.0, 205.0, 496.0, 205.0, 496.0], 8, 0.0, 1.5)
@settings(deadline=None)
def test_layer_budgets_keep_the_total_and_the_limits(
    needed: list[float], mean: int, least: float, most: float
) -> None:
    floor, ceiling = max(1, int(least * mean)), int(most * mean)
    shares = stages.layer_rows(torch.tensor(needed)[:, None], mean, floor, ceiling)[:, 0]
    assert int(shares.sum()) == mean * len(needed)
    assert floor <= int(shares.min()) <= int(shares.max()) <= ceiling
    # More need never gets less, up to the rounding of a running total.
    order = torch.tensor(needed).argsort(stable=True)
    assert (torch.diff(shares[order]) >= -1).all()


# --- protected rows ---


def test_instruction_and_sinks_survive_a_budget_that_would_evict_them() -> None:
    rows = layout([(14, 20)], tail=12)
    prefill = random_prefill(rows)
    keys = prefill.keys.clone()
    # Rows that no query looks at.
    keys[:, :, :, :4] = -20.0 * prefill.queries.mean((2, 3), keepdim=True)[..., :1, :]
    unseen = replace(prefill, keys=keys)
    length, kept_rows = rows.length, 30
    chosen = rows.protected(kept_rows, prefill.window)
    assert chosen == (0, 1, 2, 3)
    marked = torch.from_numpy(rows.marked(chosen)).expand_as(unseen.row_meta)
    for config, protected, survive in ((NATIVE, 4, True), (OFFICIAL, 0, False)):
        shown = replace(unseen, row_meta=marked) if protected else unseen
        kept, _, _ = compress(shown, initial(shown), config, kept_rows, length, protected)
        assert kept is not None
        held = [set(range(4)) <= set(kept.rows[layer, 0, 0].tolist()) for layer in range(3)]
        assert all(held) if survive else not any(held)
        assert int(kept.kv_len.sum()) == 3 * kept_rows


@given(st.integers(2, 400), st.integers(1, 64), st.integers(0, 60))
def test_protected_rows_take_a_quarter_of_what_competes_at_most(kept: int, window: int, wanted: int) -> None:
    rows = layout([(20, 20)])
    rows = replace(rows, protect_order=tuple(range(wanted)))
    chosen = rows.protected(kept, window)
    assert 4 * len(chosen) <= max(0, kept - window)
    assert all(row < rows.length - window for row in chosen)
    assert chosen == tuple(range(len(chosen)))


# --- the window of a tiny budget ---


@given(st.integers(2, 4000))
def test_the_window_takes_a_quarter_of_the_kept_rows_at_most(kept: int) -> None:
    assert OFFICIAL.window_for(kept) == max(1, min(8, kept - 2))
    window = NATIVE.window_for(kept)
    assert 4 * window <= max(4, kept)
    assert window == 8 if kept >= 32 else window == max(1, kept // 4)


# --- scores in float32 ---


def test_bfloat16_scores_tie_where_float32_scores_do_not() -> None:
    """Selection then depends on how a top-k breaks ties. The cache stays in bfloat16 either way."""
    prefill = random_prefill(layout([SCREEN]), shape=Shape(layers=1), dtype=torch.bfloat16)
    past = prefill.keys.shape[3] - prefill.window
    distinct = {}
    for dtype in ("float32", "model"):
        config = replace(NATIVE, score_dtype=dtype)
        scores, _ = score(prefill, initial(prefill), config)
        assert scores.final.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
        distinct[dtype] = len(scores.final[0, 0, :past].unique())
    assert distinct["model"] < 800 < 0.95 * past < distinct["float32"]
    kept, _, _ = compress(prefill, initial(prefill), NATIVE, 500, prefill.keys.shape[3])
    assert kept is not None
    assert kept.keys.dtype == torch.bfloat16
