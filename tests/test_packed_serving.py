# SPDX-License-Identifier: Apache-2.0
"""Replies and many sessions at once on packed engines, and the memory that they may take."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packed_engines import LOW_RANK, QUANTIZED, PackedEngines
from served import Json, serving
from test_scheduler import asked, noise, running, submit
from test_stream import WHOLE, talk

from starkv.errors import UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import SNAPKV, STAR_KV
from starkv.runtime.agent import Agent
from starkv.runtime.kv.buffers import KvBuffers
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.serving.slots import KvMemory
from starkv.runtime.session import Session

SOME = ("int8", "int4", "rank 0.5 int8")


def test_methods_that_cant_be_packed_keep_floats(packed: PackedEngines) -> None:
    agent, images = packed.agent("int8"), [noise(0)]
    request = asked("click", 4, images)
    exact = Session(packed.exact.engine, agent.tokenizer, KvPolicy(SNAPKV, Budget(0.4)))
    own = Session(agent.engine, agent.tokenizer, KvPolicy(SNAPKV, Budget(0.4)))
    texts = ["".join(one.reply(request.messages, images, request.parameters)) for one in (exact, own)]
    assert texts[0] == texts[1]
    assert own.timings.kv_bytes_kept == exact.timings.kv_bytes_kept
    refused = Session(agent.engine, agent.tokenizer, KvPolicy(SNAPKV, Budget(0.4), packed=True))
    with pytest.raises(UsageError, match="snapkv keeps other rows for every head"):
        next(refused.reply(request.messages, images, request.parameters))


def test_packing_that_an_engine_lacks_is_refused(packed: PackedEngines) -> None:
    session = Session(packed.exact.engine, packed.exact.tokenizer, KvPolicy(packed=True))
    with pytest.raises(UsageError, match=r"without a packed cache.*starkv pack ENGINE --kv-quant int8"):
        next(session.reply(asked("hi").messages, []))
    with pytest.raises(UsageError, match="without a packed cache"):
        packed.exact.engine.new_pool(1, 64, packed=True)


@pytest.mark.parametrize("variant", [*SOME, "rank 0.5"])
@pytest.mark.parametrize("policy", [WHOLE, KvPolicy(STAR_KV, Budget(0.5))], ids=["full", "star_kv"])
def test_the_account_of_a_reply(packed: PackedEngines, variant: str, policy: KvPolicy) -> None:
    agent = packed.agent(variant)
    info = agent.engine.info
    assert info.kv_packing is not None
    session = Session(agent.engine, agent.tokenizer, policy)
    request = asked("click", 70, [noise(1)])
    "".join(session.reply(request.messages, request.images, request.parameters))
    timings = session.timings
    assert timings.kv_bytes_full == timings.kv_tokens_full * info.kv_bytes_per_row
    raw = info.kv_packing.raw_rows or 0
    packed_rows = timings.kv_tokens_kept - raw
    # Layers keep different numbers of rows, and take different numbers of bytes for each.
    near = 0.0 if policy == WHOLE else 0.2
    expected = packed_rows * info.kv_packing.bytes_per_row + raw * info.kv_bytes_per_row
    assert timings.kv_bytes_kept == pytest.approx(expected, rel=near)
    new = timings.generated_tokens - 1
    each = info.kv_bytes_per_row if raw else info.kv_packing.bytes_per_row
    assert timings.kv_bytes_held == timings.kv_bytes_kept + new * each
    assert timings.kv_bytes_held < timings.kv_bytes_reserved
    assert timings.kv_bytes_kept < timings.kv_bytes_full


@pytest.mark.parametrize("variant", SOME)
def test_chosen_rows_count_before_they_are_packed(
    packed: PackedEngines, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are floats for a moment, beside the prompt's and the slot."""
    agent, allocated, original = packed.agent(variant), [], KvBuffers.allocate
    info = agent.engine.info
    assert info.kv_packing is not None

    def allocate(*arguments: Any) -> KvBuffers:
        made = original(*arguments)
        allocated.append(made.bytes_reserved)
        return made

    request = asked("click", 5, [noise(1)])
    for policy, times in ((WHOLE, 1), (KvPolicy(STAR_KV, Budget(0.5)), 2)):
        session = Session(agent.engine, agent.tokenizer, policy)
        allocated.clear()
        with monkeypatch.context() as patch:
            patch.setattr(KvBuffers, "allocate", allocate)
            "".join(session.reply(request.messages, request.images, request.parameters))
        assert len(allocated) == times
        slot = session.timings.kv_bytes_reserved - sum(allocated)
        raw = 0 if info.kv_packing.raw_rows is None else 64 * info.kv_bytes_per_row
        assert slot in [rows * info.kv_packing.bytes_per_row + raw for rows in (64, 128)]


@pytest.mark.parametrize("variant", SOME)
def test_many_sessions_get_what_each_would_get_alone(packed: PackedEngines, variant: str) -> None:
    agent = packed.agent(variant)
    policies = (KvPolicy(STAR_KV, Budget(0.5)), WHOLE, KvPolicy(packed=False), KvPolicy(SNAPKV, Budget(0.4)))
    requests = [
        asked(f"click {n}", 4 + 2 * n, [noise(n)], policy=policies[n % len(policies)]) for n in range(8)
    ]
    with running(agent.engine, agent.tokenizer, slots=4, prefill_rows=16) as scheduler:
        together = [listener.wait() for _, listener in [submit(scheduler, r) for r in requests]]
        assert scheduler.status().kv_bytes_held == 0
    for request, listener in zip(requests, together, strict=True):
        session = Session(agent.engine, agent.tokenizer, request.policy)
        alone = "".join(session.reply(request.messages, request.images, request.parameters))
        assert listener.text == alone
        assert listener.end.timings.kv_bytes_kept == session.timings.kv_bytes_kept


def test_served_sessions_go_on_from_packed_rows(packed: PackedEngines) -> None:
    agent = packed.agent("rank 0.5 int4")
    alone = talk(agent, WHOLE, mode="stream")
    with running(agent.engine, agent.tokenizer) as scheduler:
        for number in range(3):
            reply = alone.step(number, most=4)
            messages, images = alone.messages[:-1], list(alone.images)
            _, listener = submit(scheduler, asked("", 4, images, messages=messages, session_id="a"))
            assert listener.wait().text == reply
            assert listener.end.reused_tokens == alone.session.reused_tokens
            assert alone.session.state is not None
            parked = alone.session.state.rows.nbytes
            assert scheduler.status().parked_bytes == parked


class WatchedMemory:
    """Notes the most that was ever allocated, and the most that was reserved for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.excess = 0
        self.most = 0
        original = KvMemory.slot

        def slot(memory: KvMemory, turn: object) -> object:
            pool = original(memory, turn)  # type: ignore[arg-type]
            self.look(memory, turn.staged_bytes)  # type: ignore[attr-defined]
            return pool

        monkeypatch.setattr(KvMemory, "slot", slot)

    def look(self, memory: KvMemory, staged: int = 0) -> None:
        arena = memory._arena.kv.bytes_reserved if memory._arena else 0
        allocated = staged + arena + sum(pool.pool.kv.bytes_reserved for pool in memory.pools)
        promised = memory._staged_bytes + arena + sum(pool.promised_bytes for pool in memory.pools)
        self.excess = max(self.excess, allocated - promised)
        self.most = max(self.most, memory.bytes_reserved)


@pytest.mark.parametrize("variant", [*QUANTIZED, *LOW_RANK])
def test_no_more_is_allocated_than_was_reserved(
    packed: PackedEngines, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when tails have grown with their replies, and replies of other lengths joined a pool."""
    agent = packed.agent(variant)
    limit = 900 * agent.engine.info.kv_bytes_per_row
    watched = WatchedMemory(monkeypatch)
    with running(agent.engine, agent.tokenizer, slots=4, kv_bytes=limit, prefill_rows=64) as scheduler:
        memory: KvMemory = scheduler._work.memory
        policies = (WHOLE, KvPolicy(STAR_KV, Budget(0.5)))
        for lengths in ((3, 90, 20, 70), (120, 5, 60, 100)):
            listeners = [
                submit(scheduler, asked("click", n, [noise(n)], policy=policies[i % 2]))[1]
                for i, n in enumerate(lengths)
            ]
            texts = [listener.wait().text for listener in listeners]
            assert all(texts)
            watched.look(memory)
    assert watched.excess <= 0
    assert 0 < watched.most <= limit


def test_long_replies_join_no_pool_of_short_ones(packed: PackedEngines) -> None:
    """A slot's tail grows with its reply, and the pool was paid for the tails it was made for."""
    memory = KvMemory(packed.engine("rank 0.5 int8"), 1 << 30, 4)

    def pool_for(kept: int, reply: int) -> Any:
        turn: Any = SimpleNamespace(packed=True, policy=WHOLE, kept_rows=kept, slot_rows=kept + reply)
        found = memory.slot(turn)
        assert found is not None
        return found

    short, long = pool_for(110, 10), pool_for(10, 110)
    assert (short.tail_rows, long.tail_rows) == (64, 128)
    assert pool_for(80, 48) is short
    assert pool_for(79, 49) is long
    for pool in (short, long):
        pool.pool.kv.tail_lengths[:] = pool.tail_rows - 1
        pool.pool.kv.grow_tail(4)
        assert pool.pool.kv.bytes_reserved == pool.promised_bytes


def test_what_never_fits_counts_packed_rows(packed: PackedEngines) -> None:
    """A memory that a packed slot fits and a float one doesn't takes the packed turn."""
    agent = packed.agent("int4")
    row = agent.engine.info.kv_bytes_per_row
    # The arena takes 64 rows, a float slot 256, a packed one as much as 36.
    with running(agent.engine, agent.tokenizer, kv_bytes=64 * 2 * row, slots=1) as scheduler:
        assert submit(scheduler, asked("hi", 150))[1].wait().text
        refused = submit(scheduler, asked("hi", 150, policy=KvPolicy(packed=False)))[1].wait()
        assert "KV memory" in str(refused.error)


def test_agents_pack_by_default(packed: PackedEngines, screenshot: Path) -> None:
    """An engine that can pack does, unless it is told not to."""
    agent = packed.agent("int8")
    assert isinstance(agent, Agent)
    info = agent.engine.info
    assert info.kv_packing is not None
    default = agent.act(screenshot, "click").timings
    exact = agent.act(screenshot, "click", kv_policy=KvPolicy(packed=False)).timings
    assert default.kv_bytes_kept == default.kv_tokens_kept * info.kv_packing.bytes_per_row
    assert exact.kv_bytes_kept == exact.kv_bytes_full == default.kv_bytes_full


def test_requests_say_whether_rows_are_packed(packed: PackedEngines) -> None:
    agent = packed.agent("int8")
    info = agent.engine.info
    assert info.kv_packing is not None
    fields: Json = {"messages": [{"role": "user", "content": "click"}], "max_tokens": 3}
    with serving(agent.engine, agent.tokenizer) as server:
        kept = [
            server.chat(**fields, **more).json()["timings"]["kv_bytes_kept"]
            for more in ({}, {"kv_packed": False})
        ]
        refused = server.chat(**fields, kv_packed=True, kv_method="snapkv", kv_budget=0.5)
        of_session = server.chat(**fields, kv_packed=True, kv_method="snapkv", kv_budget=0.5, session_id="a")
    assert kept[0] / info.kv_packing.bytes_per_row == kept[1] / info.kv_bytes_per_row
    for answer in (refused, of_session):
        assert answer.status_code == 400
        assert "snapkv keeps other rows for every head" in answer.json()["error"]["message"]
    with serving(packed.exact.engine, agent.tokenizer) as server:
        lacking = server.chat(**fields, kv_packed=True)
    assert lacking.status_code == 400
    assert "without a packed cache" in lacking.json()["error"]["message"]
