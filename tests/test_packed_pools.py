# SPDX-License-Identifier: Apache-2.0
"""Pools of packed rows: their bytes, batches, growing tails, tables of positions, and what they refuse."""

import numpy as np
import pytest
from engine_runs import PROMPT, SMALLER
from packed_engines import (
    EVICTED,
    LOW_RANK,
    ROWS,
    VARIANTS,
    WHOLE,
    PackedEngines,
    codec_of,
    decoded,
    placed,
    pool_with,
    prefilled,
    relative,
    rope,
    tokens,
    unpacked,
)

from starkv.errors import UsageError
from starkv.runtime.engines.base import Rope
from starkv.runtime.kv.low_rank import LowRankKv


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
