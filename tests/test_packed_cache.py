# SPDX-License-Identifier: Apache-2.0
"""Decoding from packed rows in the ONNX Runtime engine says what the rows say that they stand for."""

import numpy as np
import pytest
from engine_runs import PROMPT
from packed_engines import (
    EVICTED,
    QUANTIZED,
    ROWS,
    VARIANTS,
    WHOLE,
    PackedEngines,
    codec_of,
    decoded,
    pool_with,
    prefilled,
    relative,
    unpacked,
)

from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.rotary import rotate
from starkv.methods.names import FULL
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.low_rank import LowRankKv
from starkv.runtime.kv.policy import KvPolicy

CODES = tuple(name for name in VARIANTS if name not in ("rank 1", "rank 0.5"))
"""Variants whose rows are codes; the others' are floats."""


@pytest.mark.parametrize("policy", [WHOLE, EVICTED], ids=["full", "star_kv"])
def test_all_channels_as_floats_say_what_the_exact_engine_says(
    packed: PackedEngines, policy: KvPolicy
) -> None:
    """Also over many steps, in which the tail outgrows its first memory."""
    exact, engine = packed.exact.engine, packed.engine("rank 1")
    expected = decoded(exact, pool_with(exact, policy, packed=False), 100)
    pool = pool_with(engine, policy)
    assert isinstance(pool.kv, LowRankKv)
    first = pool.kv.tail_keys.shape[3]
    actual = decoded(engine, pool, 100)
    assert pool.kv.tail_keys.shape[3] > first
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(pool.kv.tail_lengths, 16 + 100)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_exact_cache_of_a_packed_engine_is_the_plain_engines(packed: PackedEngines, variant: str) -> None:
    exact, engine = packed.exact.engine, packed.engine(variant)
    pools = [pool_with(one, EVICTED, packed=False) for one in (exact, engine)]
    np.testing.assert_array_equal(pools[0].kv.lengths, pools[1].kv.lengths)
    np.testing.assert_array_equal(decoded(engine, pools[1], 5), decoded(exact, pools[0], 5))


@pytest.mark.parametrize("policy", [WHOLE, EVICTED], ids=["full", "star_kv"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_reads_what_the_rows_unpack_to(packed: PackedEngines, variant: str, policy: KvPolicy) -> None:
    """The same logits as a float cache of the unpacked rows, up to the quantization of the new row alone."""
    engine = packed.engine(variant)
    pool = pool_with(engine, policy)
    floats = unpacked(engine, codec_of(engine, packed, variant), pool)
    error = relative(decoded(engine, pool, 1), decoded(engine, floats, 1))
    assert error < {"int8": 2e-3, "int4": 6e-2}.get(variant, 1e-5)


@pytest.mark.parametrize("variant", ["int8", "rank 0.5 int8"])
def test_tables_follow_a_long_reply(packed: PackedEngines, variant: str) -> None:
    """Positions go beyond those that were bound first."""
    engine, steps = packed.engine(variant), 100
    pool = pool_with(engine)
    decoded(engine, pool, steps)
    floats = unpacked(engine, codec_of(engine, packed, variant), pool)
    after = PROMPT.length + steps
    assert relative(decoded(engine, pool, 1, after), decoded(engine, floats, 1, after)) < 2e-3


@pytest.mark.parametrize("variant", QUANTIZED)
def test_codes_are_those_of_the_rule(packed: PackedEngines, variant: str) -> None:
    """Appended rows, too: the operator rounds as the packing does."""
    engine, packing = packed.engine(variant), packed.packing(variant)
    assert isinstance(packing, QuantizedPacking)
    pool = pool_with(engine)
    arena = prefilled(engine, PROMPT.length)
    decoded(engine, pool, 3)
    # The exact engine's rows behind the same codes: layer 0 sees embeddings alone, which are the same.
    exact = pool_with(packed.exact.engine, packed=False)
    decoded(packed.exact.engine, exact, 3)
    rotary = codec_of(engine, packed, variant).rotary
    rows = PROMPT.length + 3
    positions = exact.kv.positions[0, 0, :rows]
    floats = (exact.host_kv.keys, exact.host_kv.values)
    keys, values = (array[0, 0, :, :rows].transpose(1, 0, 2) for array in floats)
    wanted = packing.layers[0].quantize(keys, values, positions, rotary)
    np.testing.assert_array_equal(pool.kv.positions[0, 0, :rows], positions)
    parked = pool.kv.park(0)
    for codes, stored in ((wanted.keys, parked.keys[0]), (wanted.values, parked.values[0])):
        mine, theirs = codes.transpose(1, 0, 2), stored
        np.testing.assert_array_equal(mine[:, : PROMPT.length], theirs[:, : PROMPT.length])
        # A number in the middle between two codes may fall to either side.
        differing = mine[:, PROMPT.length :] != theirs[:, PROMPT.length :]
        assert differing.mean() < 0.01
    assert arena.kv.lengths[0, 0] == PROMPT.length


@pytest.mark.parametrize(
    ("variant", "most"),
    [("int8", 0.05), ("int4", 0.6), ("rank 1 int8", 0.03)],
)
@pytest.mark.parametrize("policy", [WHOLE, EVICTED], ids=["full", "star_kv"])
def test_large_biases_drown_nothing(
    packed: PackedEngines, variant: str, most: float, policy: KvPolicy
) -> None:
    exact, engine = packed.exact.engine, packed.engine(variant)
    expected = decoded(exact, pool_with(exact, policy, packed=False), 20)
    error = relative(decoded(engine, pool_with(engine, policy), 20), expected)
    assert error < most
    if variant == "int8":
        assert relative(decoded(exact, with_naive_keys(packed, policy), 20), expected) > 5 * error


def with_naive_keys(packed: PackedEngines, policy: KvPolicy) -> Pool:
    """The exact engine's rows, keys in int8 by one scale of their largest number, the bias among it."""
    pool = pool_with(packed.exact.engine, policy, packed=False)
    for layer in pool.host_kv.keys:
        scale = np.abs(layer).max() / 127
        layer[:] = np.rint(layer / scale) * scale
    return pool


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_again_changes_nothing(packed: PackedEngines, variant: str) -> None:
    """A stream packs its history again at every step; errors must not add up."""
    engine = packed.engine(variant)
    codec, pool = codec_of(engine, packed, variant), pool_with(engine)
    decoded(engine, pool, 3)
    first = last = pool.kv.park(0)
    for _ in range(5):
        arena = engine.new_arena(ROWS)
        arena.kv.load(0, last)
        again = engine.new_pool(1, ROWS, packed=True)
        again.acquire()
        again.kv.pack(0, arena.host_kv)  # type: ignore[attr-defined]
        last = again.kv.park(0)
    if variant in CODES:
        for before, after in zip((*first.keys, *first.values), (*last.keys, *last.values), strict=True):
            np.testing.assert_array_equal(before, after)
    floats = codec.unpack(first), codec.unpack(last)
    for before, after in zip(floats[0].keys, floats[1].keys, strict=True):
        np.testing.assert_allclose(before, after, atol=1e-4)
    assert last.nbytes == first.nbytes


def test_biases_are_as_large_as_they_should_be(packed: PackedEngines) -> None:
    """The premise of the tests above: biases tower over all else in the keys."""
    packing = packed.packing("int8")
    assert isinstance(packing, QuantizedPacking)
    engine = packed.engine("int8")
    rotary = codec_of(engine, packed, "int8").rotary
    arena = prefilled(engine, PROMPT.length)
    for layer, quantization in enumerate(packing.layers):
        keys = arena.host_kv.keys[layer, 0, :, : PROMPT.length].transpose(1, 0, 2)
        tables = rotary.tables(arena.kv.positions[layer, 0, : PROMPT.length])
        rest = keys - rotate(quantization.key_bias, *(table[:, None] for table in tables))
        assert np.abs(keys).max() > 10 * np.abs(rest).max()
        assert np.abs(rest).std() > 0.1
    assert WHOLE.method == FULL
