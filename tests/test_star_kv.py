# SPDX-License-Identifier: Apache-2.0
"""STaR-KV's PyTorch reference: what holds for every prompt, in both modes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import Shape, joined, layout, padded, part, random_prefill, repeated_heads

from starkv.errors import UsageError
from starkv.methods import star_kv_stages as stages
from starkv.methods.prefill import Prefill
from starkv.methods.rows import NO_FRAME, prompt_rows
from starkv.methods.star_kv import compress, score
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_state import StarKVState
from starkv.methods.window import hidden_norm_boost, window_scores

OFFICIAL, NATIVE = StarKVConfig.official(), StarKVConfig()
TWO_FRAMES = layout([(9, 16), (14, 20)])


def initial(prefill: Prefill, official: bool = False) -> StarKVState:
    layers, batch, groups = prefill.keys.shape[:3]
    return StarKVState.initial(layers, 1 if official else batch, groups)


@pytest.mark.parametrize("config", [OFFICIAL, NATIVE], ids=["official", "native"])
def test_scoring_reads_grouped_heads_as_it_reads_repeated_ones(config: StarKVConfig) -> None:
    """The cache keeps its KV heads: the official code's copies add bytes and nothing else."""
    prefill = random_prefill(TWO_FRAMES, official=config.is_official)
    mass = window_scores(prefill.window_queries, prefill.keys, prefill.kv_len)
    copies = repeated_heads(prefill)
    of_copies = window_scores(copies.window_queries, copies.keys, copies.kv_len)
    torch.testing.assert_close(mass, of_copies, rtol=1e-5, atol=1e-7)
    kept, _, _ = compress(prefill, initial(prefill), config, 90, prefill.keys.shape[3])
    assert kept is not None
    layers, _, groups, _, dim = prefill.keys.shape
    assert int(kept.bytes_held) == layers * 90 * 2 * groups * dim * 4


def test_window_scores_are_the_softmax_of_each_query() -> None:
    prefill = random_prefill(layout([(3, 4)]), window=5, shape=Shape(layers=2, batch=2))
    mass = window_scores(prefill.window_queries, prefill.keys, prefill.kv_len)
    length, sharing = prefill.keys.shape[3], 3
    for layer, sequence, head in ((0, 0, 0), (1, 1, 5), (0, 1, 4)):
        expected = torch.zeros(length)
        for query in range(5):
            seen = length - 5 + query + 1
            keys = prefill.keys[layer, sequence, head // sharing, :seen]
            share = torch.softmax(keys @ prefill.queries[layer, sequence, head, query] / 4.0, 0)
            expected[: length - 5] += share[: length - 5]
        torch.testing.assert_close(mass[layer, sequence, head], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", [OFFICIAL, NATIVE], ids=["official", "native"])
def test_all_layers_at_once_equal_one_after_the_other(config: StarKVConfig) -> None:
    prefill = random_prefill(TWO_FRAMES, official=config.is_official)
    together, _ = score(prefill, initial(prefill), config)
    for layer in range(3):
        own = part(prefill, layer=slice(layer, layer + 1))
        alone, _ = score(own, initial(own), config)
        torch.testing.assert_close(alone.final[0], together.final[layer], rtol=2e-6, atol=1e-9)


def test_a_batch_in_native_mode_equals_its_sequences() -> None:
    prefill = random_prefill(TWO_FRAMES, shape=Shape(batch=2))
    state = initial(prefill)
    for _ in range(2):
        together, state = score(prefill, state, NATIVE)
    for sequence in range(2):
        own = part(prefill, sequence=slice(sequence, sequence + 1))
        alone_state = initial(own)
        for _ in range(2):
            alone, alone_state = score(own, alone_state, NATIVE)
        torch.testing.assert_close(alone.final[:, 0], together.final[:, sequence], rtol=2e-6, atol=1e-9)
        torch.testing.assert_close(alone_state.mi_ema[:, 0], state.mi_ema[:, sequence])
        torch.testing.assert_close(alone_state.pattern_ema[:, 0], state.pattern_ema[:, sequence])


def test_a_batch_in_official_mode_shares_one_state() -> None:
    """The second sequence sees the averages that the first left, the temperature is that of the batch, and
    only the temporal step counts once (spec star-kv.md §8)."""
    config = StarKVConfig.official(mi_profile_steps=1, mi_ramp_steps=2)
    prefill = random_prefill(TWO_FRAMES, official=True, shape=Shape(batch=2))
    together, state = score(prefill, initial(prefill, official=True), config)
    assert (state.progress.profile_step, state.progress.temporal_step) == (2, 1)
    walking = initial(prefill, official=True)
    for sequence in range(2):
        own = part(prefill, sequence=slice(sequence, sequence + 1))
        alone, walking = score(own, walking, config)
        torch.testing.assert_close(alone.after_temporal[:, 0], together.after_temporal[:, sequence])
    torch.testing.assert_close(walking.mi_ema, state.mi_ema)
    torch.testing.assert_close(walking.pattern_ema, state.pattern_ema)
    own = stages.entropy_temperature(together.entropy, config.entropy_min, config.entropy_max)
    torch.testing.assert_close(state.temperature, own.mean(1, keepdim=True))
    assert not torch.equal(together.after_mi[:, 0], together.after_mi[:, 1])


@pytest.mark.parametrize("config", [OFFICIAL, NATIVE], ids=["official", "native"])
@pytest.mark.parametrize("garbage", [0.0, 1e4, torch.nan, torch.inf])
def test_rows_behind_the_valid_ones_are_never_read(config: StarKVConfig, garbage: float) -> None:
    prefill = random_prefill(TWO_FRAMES, official=config.is_official)
    length = prefill.keys.shape[3]
    clean, scores, _ = compress(prefill, initial(prefill), config, 90, length)
    dirty, padded_scores, _ = compress(padded(prefill, 7, garbage), initial(prefill), config, 90, length)
    assert clean is not None
    assert dirty is not None
    assert scores is not None
    assert padded_scores is not None
    torch.testing.assert_close(padded_scores.final[..., :length], scores.final, rtol=1e-6, atol=0)
    assert torch.equal(dirty.rows, clean.rows)
    assert torch.equal(dirty.keys, clean.keys)


def test_sequences_of_different_lengths_share_a_batch() -> None:
    """A batch is padded on the right; each sequence is scored as it would be alone."""
    short, long = layout([(6, 8)]), layout([(6, 8)], tail=20)
    sizes = Shape(layers=2)
    alone = [random_prefill(rows, shape=sizes, seed=seed) for seed, rows in enumerate((short, long))]
    extra = long.length - short.length
    batch = joined([padded(alone[0], extra, 1e3), alone[1]])
    # The newest screenshot lies elsewhere in each, so what depends on it stays out here.
    config = replace(NATIVE, boost=0.0, mi=False, temporal=False)
    batch = replace(batch, frame=NO_FRAME)
    together, _ = score(batch, StarKVState.initial(2, 2, 2), config)
    for sequence, own in enumerate(alone):
        single, _ = score(replace(own, frame=NO_FRAME), StarKVState.initial(2, 1, 2), config)
        length = own.keys.shape[3]
        torch.testing.assert_close(
            together.final[:, sequence, :length], single.final[:, 0], rtol=2e-6, atol=1e-9
        )
        ranked = together.priorities[:, sequence, 0]
        assert (ranked[:, length - 8 : length] == torch.inf).all()
        assert (ranked[:, length:] == -torch.inf).all()


@given(st.floats(0.05, 1.0), st.integers(0, 50), st.booleans())
@settings(max_examples=25, deadline=None)
def test_kept_rows_are_the_best_scores_and_the_window(share: float, seed: int, official: bool) -> None:
    config = OFFICIAL if official else NATIVE
    prefill = random_prefill(TWO_FRAMES, official=official, seed=seed)
    length = prefill.keys.shape[3]
    rows = max(10, int(share * length))
    kept, scores, _ = compress(prefill, initial(prefill), config, rows, length)
    assert kept is not None
    assert scores is not None
    past = length - 8
    for layer in range(3):
        count = int(kept.kv_len[layer, 0])
        final = scores.final[layer, 0, :past].numpy()
        best = np.sort(np.argsort(-final, kind="stable")[: count - 8])
        expected = [*best, *range(past, length)]
        assert kept.rows[layer, 0, 0].tolist() == expected + [-1] * (kept.rows.shape[-1] - count)
        assert torch.equal(kept.keys[layer, 0, :, :count], prefill.keys[layer, 0, :, expected])
        assert torch.equal(kept.values[layer, 0, :, :count], prefill.values[layer, 0, :, expected])
    assert int(kept.kv_len.sum()) == 3 * rows


@pytest.mark.parametrize("config", [OFFICIAL, NATIVE], ids=["official", "native"])
def test_a_whole_budget_keeps_every_bit(config: StarKVConfig) -> None:
    prefill = random_prefill(TWO_FRAMES, official=config.is_official)
    length = prefill.keys.shape[3]
    kept, _, state = compress(prefill, initial(prefill), config, length, length)
    assert kept is not None
    assert torch.equal(kept.keys, prefill.keys)
    assert torch.equal(kept.values, prefill.values)
    assert kept.row_meta is not None
    assert torch.equal(kept.row_meta, prefill.row_meta)
    assert state.progress.temporal_step == 1


def test_a_prompt_shorter_than_its_budget_is_left_alone() -> None:
    prefill = random_prefill(TWO_FRAMES)
    length = prefill.keys.shape[3]
    before = initial(prefill)
    kept, scores, after = compress(prefill, before, NATIVE, length + 1, length)
    assert kept is None
    assert scores is None
    assert (after.progress.temporal_step, after.progress.profile_step) == (1, 0)


def test_text_without_screenshots_is_compressed_by_attention_alone() -> None:
    rows = layout([], tail=60)
    for config in (OFFICIAL, NATIVE):
        prefill = random_prefill(rows, official=config.is_official)
        kept, scores, state = compress(prefill, initial(prefill), config, 20, 60)
        assert kept is not None
        assert scores is not None
        assert not scores.boost.any()
        assert scores.information is None
        torch.testing.assert_close(scores.after_temporal, scores.pooled.mean(2), rtol=1e-6, atol=0)
        assert not state.progress.mi_known


def test_scores_that_are_not_numbers_are_never_preferred() -> None:
    prefill = random_prefill(layout([(5, 6)]))
    spoiled = torch.zeros(3, 1, 1, prefill.keys.shape[3])
    spoiled[..., 3] = torch.nan
    spoiled[..., 5] = torch.inf
    ranked = prefill.priorities(spoiled)
    assert not ranked.isnan().any()
    assert (ranked[..., 3] == -torch.inf).all()
    # Infinite scores stay below rows that have to stay.
    assert (ranked[..., 5] < ranked[..., -1]).all()


def test_a_screenshot_of_one_token_gets_the_whole_boost() -> None:
    """The official code divides by the deviation of one number, which is not a number."""
    norm = torch.tensor([[[3.0, 1.0, 2.0]]])
    boost = hidden_norm_boost(norm, torch.tensor([[[False, True, False]]]), alpha=2.0, temperature=3.5)
    assert boost.tolist() == [[[0.0, 2.0, 0.0]]]
    none = hidden_norm_boost(norm, torch.zeros(1, 1, 3, dtype=torch.bool), alpha=2.0, temperature=3.5)
    assert none.tolist() == [[[0.0, 0.0, 0.0]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 9}, "window of 9 queries is asked for, but 8 are there"),
        ({"values": torch.zeros(3, 1, 2, 5, 16)}, "values .* and keys .* differ"),
        ({"queries": torch.zeros(3, 1, 5, 8, 16)}, "5 query heads can't share 2 KV heads"),
        ({"queries": torch.zeros(3, 1, 6, 8, 4)}, "queries .* don't fit keys"),
        ({"kv_len": torch.zeros(3)}, r"kv_len must be \(3, 1\)"),
        ({"row_meta": torch.zeros(3, 1, 5, 4)}, "row_meta must be"),
        ({"hidden_norm": torch.zeros(3, 1, 5)}, "hidden_norm must be"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    prefill = random_prefill(layout([(5, 6)]))
    with pytest.raises(UsageError, match=message):
        replace(prefill, **change)


def test_budgets_that_can_not_be_met_are_refused() -> None:
    prefill = random_prefill(layout([(5, 6)]))
    length = prefill.keys.shape[3]
    with pytest.raises(UsageError, match="20 protected rows exceed the 12"):
        compress(prefill, initial(prefill), NATIVE, 20, length, protected=20)
    tiny = random_prefill(prompt_rows(8, [], []), window=8)
    with pytest.raises(UsageError, match="window of 8 rows leaves nothing"):
        compress(tiny, initial(tiny), NATIVE, 8, 8)
    with pytest.raises(UsageError, match="metadata of 48 rows for a cache of 47"):
        Prefill.of_prompt(
            prefill.keys[:, :, :, 1:], prefill.values[:, :, :, 1:], prefill.queries, layout([(5, 6)]), 8
        )
