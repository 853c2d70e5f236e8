# SPDX-License-Identifier: Apache-2.0
"""Which rows can be packed, and that packing them takes nothing from the others."""

import numpy as np
import pytest
from engine_runs import PROMPT
from packed_engines import (
    EVICTED,
    ROWS,
    WHOLE,
    PackedEngines,
    placed,
    pool_with,
    prefilled,
    rope,
    tokens,
)

from starkv.errors import EngineError, UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import RANDOM, SNAPKV, STAR_KV, STREAMING_LLM
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.engines.base import Rope
from starkv.runtime.kv.policy import KvPolicy


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
