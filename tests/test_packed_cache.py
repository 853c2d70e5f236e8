# SPDX-License-Identifier: Apache-2.0
"""Packed caches in the ONNX Runtime engine: what they hold, what decoding from them says, what they take."""

import numpy as np
import pytest
from engine_runs import PROMPT, SMALLER
from packed_engines import (
    EVICTED,
    LOW_RANK,
    QUANTIZED,
    VARIANTS,
    WHOLE,
    PackedEngines,
    decoded,
    placed,
    prefilled,
    relative,
    rope,
    tokens,
)

from starkv.errors import EngineError, UsageError
from starkv.kv_packing.quantized import QuantizedPacking
from starkv.lowrank.rotary import rotate
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, RANDOM, SNAPKV, STAR_KV, STREAMING_LLM
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.engines.base import Engine, Rope
from starkv.runtime.engines.ort import OrtEngine
from starkv.runtime.kv.buffers import Pool
from starkv.runtime.kv.codecs import open_codec
from starkv.runtime.kv.low_rank import LowRankKv
from starkv.runtime.kv.packed import KvCodec
from starkv.runtime.kv.policy import KvPolicy

CODES = tuple(name for name in VARIANTS if name not in ("rank 1", "rank 0.5"))
"""Variants whose rows are codes; the others' are floats."""
ROWS = 200


def codec_of(engine: OrtEngine, packed: PackedEngines, variant: str) -> KvCodec:
    codec = open_codec(packed.directory(variant), engine.manifest)
    assert codec is not None
    return codec


def pool_with(engine: Engine, policy: KvPolicy = WHOLE, packed: bool = True, rows: int = ROWS) -> Pool:
    pool = engine.new_pool(1, rows, policy.method, packed)
    placed(engine, pool, policy=policy)
    return pool


def unpacked(engine: OrtEngine, codec: KvCodec, pool: Pool) -> Pool:
    """A float pool with what a packed one stands for, its raw tail as it is."""
    floats = engine.new_pool(1, ROWS)
    floats.acquire()
    floats.kv.load(0, codec.unpack(pool.kv.park(0)))
    if isinstance(pool.kv, LowRankKv):
        for layer, recent in enumerate(pool.kv.tail_lengths[:, 0]):
            last = slice(pool.kv.lengths[layer, 0] - recent, pool.kv.lengths[layer, 0])
            floats.host_kv.keys[layer, 0, :, last] = pool.kv.tail_keys[layer, 0, :, :recent]
            floats.host_kv.values[layer, 0, :, last] = pool.kv.tail_values[layer, 0, :, :recent]
    return floats


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_are_what_arrays_take(packed: PackedEngines, variant: str) -> None:
    engine = packed.engine(variant)
    info, packing = engine.info.kv_packing, engine.manifest.kv_packing
    assert info is not None
    assert packing is not None
    assert info.name == packing.describe() == str(VARIANTS[variant]) == variant
    assert info.bytes_per_row == packing.bytes_per_row
    pool = pool_with(engine)
    parked, rows = pool.kv.park(0), PROMPT.length
    known = sum(array.nbytes for array in parked.row_meta)
    # Positions are counted: keys can't be read without them.
    assert parked.nbytes - known == rows * info.bytes_per_row
    raw = 0 if info.raw_rows is None else min(info.raw_rows, rows)
    held = (rows - raw) * info.bytes_per_row + raw * engine.info.kv_bytes_per_row
    assert pool.kv.bytes_held == held
    assert pool.kv.bytes_of(slice(0, 1)) == held
    kv, capacity = pool.kv, pool.kv.capacity
    if isinstance(kv, LowRankKv):
        tail = kv.tail_keys.nbytes + kv.tail_values.nbytes
        assert kv.bytes_reserved == capacity * info.bytes_per_row + tail
    else:
        assert kv.bytes_reserved == capacity * info.bytes_per_row
    decoded(engine, pool, 1)
    one = info.bytes_per_row if info.raw_rows is None else engine.info.kv_bytes_per_row
    assert pool.kv.bytes_held == held + one


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequences_of_a_batch_are_decoded_as_alone(packed: PackedEngines, variant: str) -> None:
    """Of different lengths, also when one leaves and the last one moves into its slot."""
    engine = packed.engine(variant)
    kinds = ((PROMPT, WHOLE, 0), (SMALLER, EVICTED, 1), (PROMPT, EVICTED, 2))
    pool = engine.new_pool(3, ROWS, packed=True)
    handles = [placed(engine, pool, *kind) for kind in kinds]
    alone = []
    for kind in kinds:
        single = engine.new_pool(1, ROWS, packed=True)
        placed(engine, single, *kind)
        alone.append(single)

    def step(together: list[int], start: int) -> None:
        """One token for those sequences, which lie in the pool in this order."""
        at = [rope(engine, 1, start + 7 * number).positions for number in together]
        embeds = np.concatenate([tokens(1, 50 + start + number) for number in together])
        positions = np.concatenate([place for place in at if place is not None])
        logits = engine.decode(pool, embeds, Rope.at(np.moveaxis(positions, -1, 0), engine.manifest.text))
        for row, number in enumerate(together):
            one = engine.decode(alone[number], embeds[row : row + 1], rope(engine, 1, start + 7 * number))
            np.testing.assert_allclose(logits[row], one[0], atol=2e-4 * np.abs(one).max())

    for number in range(70):
        step([0, 1, 2], 100 + number)
    pool.release(handles[0])
    assert [handles.index(handle) for handle in pool.handles] == [2, 1]
    for number in range(3):
        step([2, 1], 200 + number)
    for slot, number in enumerate((2, 1)):
        mine, theirs = pool.kv.park(slot), alone[number].kv.park(0)
        for known in ("row_meta", "positions"):
            for one, other in zip(getattr(mine, known), getattr(theirs, known), strict=True):
                np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(mine.lengths, theirs.lengths)
    if isinstance(pool.kv, LowRankKv):
        np.testing.assert_array_equal(pool.kv.tail_lengths[:, :2], 16 + 73)
    # A new sequence in the slot that was left behind is not taken for the old one.
    again = placed(engine, pool, *kinds[0])
    assert pool.slot_of(again) == 2
    fresh = engine.new_pool(1, ROWS, packed=True)
    placed(engine, fresh, *kinds[0])
    mine, theirs = pool.kv.park(2), fresh.kv.park(0)
    for one, other in zip((*mine.keys, *mine.values), (*theirs.keys, *theirs.values), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_freed_slots_tail_takes_no_memory(packed: PackedEngines) -> None:
    """The tail grows by the longest sequence in use, not by one that has left."""
    engine = packed.engine("rank 0.5 int8")
    pool = engine.new_pool(2, ROWS, packed=True)
    handles = [placed(engine, pool, seed=seed) for seed in range(2)]
    decoded(engine, pool, 48)
    assert isinstance(pool.kv, LowRankKv)
    for handle in handles:
        pool.release(handle)
    placed(engine, pool)
    decoded(engine, pool, 40)
    assert pool.kv.tail_keys.shape[3] == 64
    np.testing.assert_array_equal(pool.kv.tail_lengths[:, 0], 56)
    pool.acquire()
    np.testing.assert_array_equal(pool.kv.packed_lengths[:, 1], 0)


@pytest.mark.parametrize("variant", ["int8", "rank 0.5 int4"])
def test_positions_beyond_the_tables(packed: PackedEngines, variant: str) -> None:
    """Tables of positions grow while a reply is decoded, and for history far behind."""
    engine = packed.engine(variant)
    pool = pool_with(engine)
    codec = codec_of(engine, packed, variant)
    decoded(engine, pool, 1)
    decoded(engine, pool, 1, start=700)
    decoded(engine, pool, 1, start=5000)
    floats = unpacked(engine, codec, pool)
    assert floats.kv.positions[0, 0].max() == 5000
    error = relative(decoded(engine, pool, 1, start=5001), decoded(engine, floats, 1, start=5001))
    assert error < (2e-2 if variant == "int8" else 1e-5)


@pytest.mark.parametrize("variant", ["int4", "rank 0.5 int8"])
def test_two_pools_in_turn(packed: PackedEngines, variant: str) -> None:
    """Packed and float ones of one engine: nothing of the other's stays bound."""
    engine = packed.engine(variant)
    pools = [pool_with(engine, WHOLE), pool_with(engine, EVICTED), pool_with(engine, EVICTED, packed=False)]
    apart = []
    for policy, own in ((WHOLE, True), (EVICTED, True), (EVICTED, False)):
        apart.append(decoded(engine, pool_with(engine, policy, own), 4))
    together: list[list[np.ndarray]] = [[], [], []]
    for step in range(4):
        for outputs, pool in zip(together, pools, strict=True):
            outputs.append(decoded(engine, pool, 1, PROMPT.length + step, 100 + step)[0])
            prefilled(engine, 20)
    for outputs, expected in zip(together, apart, strict=True):
        np.testing.assert_array_equal(np.stack(outputs), expected)


@pytest.mark.parametrize("variant", ["int8", "rank 0.5 int4"])
def test_a_full_slot_is_refused(packed: PackedEngines, variant: str) -> None:
    engine = packed.engine(variant)
    pool = pool_with(engine, rows=100)
    decoded(engine, pool, 128 - PROMPT.length)
    with pytest.raises(UsageError, match="filled its slot of 128 rows"):
        decoded(engine, pool, 1)
    small = engine.new_pool(1, 64, packed=True)
    with pytest.raises(UsageError, match="90 kept rows do not fit a slot of 64"):
        placed(engine, small)


@pytest.mark.parametrize(
    "policy",
    [
        WHOLE,
        EVICTED,
        KvPolicy(STAR_KV, Budget(0.4), StarKVConfig.official()),
        KvPolicy(STREAMING_LLM, Budget(0.4)),
        KvPolicy(RANDOM, Budget(0.4)),
    ],
    ids=["full", "star_kv", "official", "streaming_llm", "random"],
)
@pytest.mark.parametrize("variant", ["int8", "rank 0.5"])
def test_compression_leaves_the_arena_as_it_was(
    packed: PackedEngines, variant: str, policy: KvPolicy
) -> None:
    """So that one prefill can be compressed in many ways."""
    engine = packed.engine(variant)
    arena = prefilled(engine, PROMPT.length)
    before = arena.kv.park(0)
    results = []
    for own in (True, False, True):
        pool = engine.new_pool(1, ROWS, policy.method, own)
        results.append((engine.compress(arena, pool, pool.acquire(), PROMPT, policy), pool))
        after = arena.kv.park(0)
        for name in ("keys", "values", "positions"):
            for one, other in zip(getattr(before, name), getattr(after, name), strict=True):
                np.testing.assert_array_equal(one, other)
    (first, pool), (exact, floats), (second, again) = results
    np.testing.assert_array_equal(first.rows, exact.rows)
    np.testing.assert_array_equal(first.rows, second.rows)
    for known in ("lengths", "row_meta", "positions"):
        rows = int(floats.kv.lengths.max())
        for other in (pool, again):
            mine, theirs = (getattr(one.kv, known) for one in (other, floats))
            if known != "lengths":
                mine, theirs = mine[:, 0, :rows], theirs[:, 0, :rows]
            np.testing.assert_array_equal(mine, theirs)


def test_methods_with_rows_of_every_heads_own(packed: PackedEngines) -> None:
    engine, policy = packed.engine("int8"), KvPolicy(SNAPKV, Budget(0.4))
    pool = engine.new_pool(1, ROWS, SNAPKV, packed=True)
    with pytest.raises(UsageError, match=r"snapkv keeps other rows for every head.*full, star_kv"):
        placed(engine, pool, policy=policy)
    placed(engine, engine.new_pool(1, ROWS, SNAPKV), policy=policy)


@pytest.mark.parametrize("variant", ["int8", "rank 0.5", "rank 0.5 int4"])
def test_rows_without_positions_are_refused(packed: PackedEngines, variant: str) -> None:
    engine = packed.engine(variant)
    arena, table = engine.new_arena(20), rope(engine, 20)
    engine.prefill(arena, tokens(20, 0), Rope(table.cos, table.sin))
    pool = engine.new_pool(1, ROWS, packed=True)
    pool.acquire()
    with pytest.raises(UsageError, match=r"without a position.*Rope\.at"):
        pool.kv.pack(0, arena.host_kv)  # type: ignore[attr-defined]
    whole = pool_with(engine)
    after = rope(engine, 1, PROMPT.length)
    with pytest.raises(UsageError, match=r"without a position.*Rope\.at"):
        engine.decode(whole, tokens(1, 0), Rope(after.cos, after.sin))


@pytest.mark.parametrize("variant", ["int8", "rank 0.5", "rank 0.5 int4"])
def test_rows_that_are_no_numbers(packed: PackedEngines, variant: str) -> None:
    engine = packed.engine(variant)
    arena = prefilled(engine, PROMPT.length)
    arena.host_kv.values[1, 0, 0, 5, 3] = np.nan
    pool = engine.new_pool(1, ROWS, packed=True)
    with pytest.raises(EngineError, match="layer 1 are not numbers"):
        engine.compress(arena, pool, pool.acquire(), PROMPT, WHOLE)


def test_rows_of_another_packing_are_refused(packed: PackedEngines) -> None:
    parked = pool_with(packed.engine("int8")).kv.park(0)
    for other in ("int4", "rank 0.5 int8", "rank 1"):
        pool = packed.engine(other).new_pool(1, ROWS, packed=True)
        with pytest.raises(UsageError, match="of another model or dtype"):
            pool.kv.load(0, parked)
    plain = packed.exact.engine.new_arena(ROWS)
    with pytest.raises(UsageError, match="of another model or dtype"):
        plain.kv.load(0, parked)
    arena = packed.engine("int4").new_arena(ROWS)
    with pytest.raises(UsageError, match="packed otherwise"):
        arena.kv.load(0, parked)


@pytest.mark.parametrize("variant", LOW_RANK)
def test_parked_rows_go_into_packed_slots(packed: PackedEngines, variant: str) -> None:
    """A slot that parked rows are loaded into has no tail until rows come behind them."""
    engine = packed.engine(variant)
    parked = pool_with(engine).kv.park(0)
    pool = engine.new_pool(1, ROWS, packed=True)
    pool.acquire()
    pool.kv.load(0, parked)
    floats = engine.new_pool(1, ROWS)
    floats.acquire()
    floats.kv.load(0, codec_of(engine, packed, variant).unpack(parked))
    assert relative(decoded(engine, pool, 3), decoded(engine, floats, 3)) < 1e-5
    assert isinstance(pool.kv, LowRankKv)
    np.testing.assert_array_equal(pool.kv.tail_lengths, 3)


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
