# SPDX-License-Identifier: Apache-2.0
"""The decode step over latents and a raw tail: exact at full rank, unmoved by eviction, by folding, by
padding."""

import dataclasses

import numpy as np
import pytest
from lowrank_cases import Case, dense, make_case, moment

from starkv.lowrank.attend import LatentRows, attend_low_rank
from starkv.lowrank.factor import Factor, output_pca, split_groups, weight_svd
from starkv.lowrank.hadamard import fold, random_rotation
from starkv.lowrank.latent_format import FORMATS, KeyLanes
from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.pack import pack_keys, pack_values, unpack_keys, unpack_values


def make_layer(
    case: Case, key_ranks: list[int] | None = None, value_rank: int | None = None, heads_per_group: int = 1
) -> LowRankLayer:
    """Factors from the case's own outputs; of full rank where none is given."""
    kv_heads = case.key_bias.shape[0]
    flat = case.plain_keys.reshape(len(case.keys), -1)
    groups = split_groups(flat.T, kv_heads, heads_per_group)
    ranks = key_ranks or [len(group) for group in groups]
    values = case.plain_values.reshape(len(case.values), -1)
    return LowRankLayer(
        keys=tuple(
            output_pca(moment(group.T)).truncated(rank) for group, rank in zip(groups, ranks, strict=True)
        ),
        values=output_pca(moment(values)).truncated(value_rank or values.shape[1]),
        key_bias=case.key_bias,
        value_bias=case.value_bias,
    )


def compress(case: Case, layer: LowRankLayer, rows: slice | np.ndarray) -> LatentRows:
    cosines, sines = (table[rows] for table in case.tables)
    return LatentRows(
        layer.key_latents(case.keys[rows], cosines, sines),
        layer.value_latents(case.values[rows]),
        case.positions[rows],
    )


@pytest.mark.parametrize("heads_per_group", [1, 2, 4])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("packed", [0, 25, 40])
def test_full_rank_is_dense_attention(heads_per_group: int, components: int, packed: int) -> None:
    """With biases, 1-D and multimodal positions, seven query heads per KV head, any part of the rows in the
    tail."""
    case = make_case(rows=40, kv_heads=4, components=components)
    layer = make_layer(case, heads_per_group=heads_per_group)
    attended = attend_low_rank(
        case.queries,
        compress(case, layer, slice(0, packed)),
        case.tail(slice(packed, None)),
        layer,
        case.rotary,
    )
    logits, heads = dense(case.queries, case.keys, case.values)
    np.testing.assert_allclose(attended.logits, logits, atol=1e-9)
    np.testing.assert_allclose(attended.heads, heads, atol=1e-9)


def test_full_rank_of_the_weights_is_exact_too() -> None:
    rng = np.random.default_rng(1)
    weight, hidden = rng.normal(size=(64, 96)), rng.normal(size=(10, 96))
    outputs = hidden @ weight.T
    full = weight_svd(weight).full
    np.testing.assert_allclose(full.lift(full.compress(outputs)), outputs, atol=1e-10)


def test_eviction_moves_no_logit_of_a_kept_token() -> None:
    case = make_case(rows=60)
    layer = make_layer(case, [12, 9], 20)
    kept = np.array([0, 1, 7, 20, 33, 34, 59])
    nothing = case.tail(slice(0, 0))
    everything = attend_low_rank(
        case.queries, compress(case, layer, slice(None)), nothing, layer, case.rotary
    )
    evicted = attend_low_rank(case.queries, compress(case, layer, kept), nothing, layer, case.rotary)
    np.testing.assert_allclose(evicted.logits, everything.logits[:, kept], atol=1e-12)


def test_row_numbers_in_place_of_positions_are_wrong() -> None:
    """What breaks if a kernel counts rows after eviction."""
    case = make_case(rows=60)
    layer = make_layer(case)
    kept = np.arange(0, 60, 5)
    history = compress(case, layer, kept)
    numbered = dataclasses.replace(history, positions=np.repeat(np.arange(len(kept))[:, None], 3, axis=1))
    exact, _ = dense(case.queries, case.keys[kept], case.values[kept])
    wrong = attend_low_rank(case.queries, numbered, case.tail(slice(0, 0)), layer, case.rotary)
    assert np.abs(wrong.logits - exact).mean() > 0.1 * np.abs(exact).mean()


@pytest.mark.parametrize("ranks", [[1, 16], [17, 31]])
def test_folding_a_rotation_changes_nothing(ranks: list[int]) -> None:
    case = make_case()
    layer = make_layer(case, ranks, 33)
    folded = dataclasses.replace(
        layer,
        keys=tuple(fold(factor, random_rotation(factor.rank)) for factor in layer.keys),
        values=fold(layer.values, random_rotation(33)),
    )
    for before, after in zip((*layer.keys, layer.values), (*folded.keys, folded.values), strict=True):
        np.testing.assert_allclose(after.up @ after.down, before.up @ before.down, atol=1e-12)
    plain, rotated = (
        attend_low_rank(
            case.queries, compress(case, one, slice(0, 30)), case.tail(slice(30, None)), one, case.rotary
        )
        for one in (layer, folded)
    )
    np.testing.assert_allclose(rotated.heads, plain.heads, atol=1e-10)


def test_rows_beyond_the_valid_ones_are_never_read() -> None:
    case = make_case()
    layer = make_layer(case, [16, 5], 24)
    rows, tail = compress(case, layer, slice(0, 30)), case.tail(slice(30, None))

    def padded(array: np.ndarray, filler: float) -> np.ndarray:
        return np.concatenate([array, np.full((9, *array.shape[1:]), filler, array.dtype)])

    capacity = LatentRows(
        [padded(latent, np.nan) for latent in rows.keys],
        padded(rows.values, np.nan),
        padded(rows.positions, -1),
        valid=30,
    )
    expected = attend_low_rank(case.queries, rows, tail, layer, case.rotary)
    attended = attend_low_rank(case.queries, capacity, tail, layer, case.rotary)
    np.testing.assert_array_equal(attended.heads, expected.heads)


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.02), ("4/4", 0.2), ("4/3", 0.35)])
def test_packing_costs_little(name: str, bound: float) -> None:
    """Full path: factors, rotation folded in, rows packed and unpacked, one softmax with the tail."""
    case = make_case(rows=80, kv_heads=4, head_dim=64)
    layer = make_layer(case, [64] * 4, 256)
    layer = dataclasses.replace(
        layer,
        keys=tuple(fold(factor, random_rotation(factor.rank)) for factor in layer.keys),
        values=fold(layer.values, random_rotation(layer.values.rank)),
    )
    history = compress(case, layer, slice(0, 70))
    latent = FORMATS[name]
    lanes = KeyLanes(tuple(factor.rank for factor in layer.keys))
    stored = LatentRows(
        unpack_keys(pack_keys(history.keys, latent), lanes, latent),
        unpack_values(pack_values(history.values, latent), layer.values.rank, latent),
        history.positions,
    )
    attended = attend_low_rank(case.queries, stored, case.tail(slice(70, None)), layer, case.rotary)
    logits, _ = dense(case.queries, case.keys, case.values)
    error = np.abs(attended.logits - logits)[:, :70].mean() / logits.std()
    assert error < bound
    assert error > 0


def test_factors_that_do_not_cover_a_layer() -> None:
    half = Factor(np.eye(16), np.eye(16))
    with pytest.raises(ValueError, match="don't cover the 64 channels"):
        LowRankLayer((half, half), Factor(np.eye(64), np.eye(64)), np.zeros((2, 32)), np.zeros((2, 32)))
    with pytest.raises(ValueError, match=r"not \[KV heads, D\] twice"):
        LowRankLayer((half, half), Factor(np.eye(32), np.eye(32)), np.zeros(32), np.zeros(32))
    with pytest.raises(ValueError, match="no pair of factors"):
        Factor(np.eye(4), np.eye(3))
