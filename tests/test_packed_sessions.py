# SPDX-License-Identifier: Apache-2.0
"""Conversations on packed engines: streams that go on from packed rows, many sessions at once, memory."""

from pathlib import Path

import numpy as np
import pytest
from packed_engines import LOW_RANK, QUANTIZED, PackedEngines
from test_scheduler import asked, noise, running, submit
from test_stream import TOKENS, WHOLE, Conversation, compacting, talk

from starkv.errors import EngineError, UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import SNAPKV, STAR_KV
from starkv.methods.rows import ROW_FRAME
from starkv.runtime.agent import Agent
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.serving.slots import KvMemory
from starkv.runtime.session import Session
from starkv.runtime.session_file import load_session, save_session
from starkv.runtime.stream import StreamState

SOME = ("int8", "int4", "rank 0.5 int8")


def state_of(conversation: Conversation) -> StreamState:
    state = conversation.session.state
    assert state is not None
    return state


@pytest.mark.parametrize("policy", [WHOLE, compacting(80)], ids=["full", "star_kv"])
def test_all_channels_as_floats_stream_as_the_exact_engine(packed: PackedEngines, policy: KvPolicy) -> None:
    """Rows that are packed, unpacked and packed again at every step are still those of the plain engine."""
    exact, mine = (talk(agent, policy, mode="stream") for agent in (packed.exact, packed.agent("rank 1")))
    for number in range(4):
        assert mine.step(number) == exact.step(number)
        assert mine.session.reused_tokens == exact.session.reused_tokens
    codec = packed.engine("rank 1").new_arena(1).host_kv.unpack
    assert codec is not None
    rows, expected = codec(state_of(mine).rows), state_of(exact).rows
    for one, other in zip((*rows.keys, *rows.values), (*expected.keys, *expected.values), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    for one, other in zip(rows.row_meta, expected.row_meta, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(rows.positions, expected.positions, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("variant", [*QUANTIZED, *LOW_RANK])
def test_a_saved_stream_goes_on_as_if_nothing_had_happened(
    packed: PackedEngines, variant: str, tmp_path: Path
) -> None:
    agent, policy, path = packed.agent(variant), compacting(80), tmp_path / "session.safetensors"
    stream = talk(agent, policy, mode="stream", screenshots=3)
    for number in range(2):
        stream.step(number)
    assert state_of(stream).rows.packed
    save_session(state_of(stream), agent.engine.manifest, path)
    restored = talk(agent, policy, mode="stream", screenshots=3)
    restored.messages, restored.images = list(stream.messages), list(stream.images)
    restored.session.state = load_session(path, agent.engine.manifest)
    for number in range(2, 4):
        assert restored.step(number) == stream.step(number)
        assert restored.session.reused_tokens == stream.session.reused_tokens > 0
    for one, other in zip(state_of(restored).rows.keys, state_of(stream).rows.keys, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_of_another_packing_is_refused(packed: PackedEngines, tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    stream = talk(packed.agent("int8"), WHOLE, mode="stream")
    stream.step(0)
    save_session(state_of(stream), packed.engine("int8").manifest, path)
    for other in (packed.engine("int4"), packed.engine("rank 0.5 int8"), packed.exact.engine):
        with pytest.raises(EngineError, match=r"was saved by another engine.*open it with that one"):
            load_session(path, other.manifest)


def test_a_state_of_another_packing_is_refused(packed: PackedEngines) -> None:
    stream = talk(packed.agent("int8"), WHOLE, mode="stream")
    stream.step(0)
    other = talk(packed.agent("rank 0.5 int8"), WHOLE, mode="stream")
    other.messages, other.images, other.session.state = stream.messages, stream.images, state_of(stream)
    with pytest.raises(UsageError, match="packed otherwise; start the session anew"):
        other.step(1)


@pytest.mark.parametrize("variant", SOME)
def test_parked_rows_are_packed(packed: PackedEngines, variant: str) -> None:
    """A waiting session takes what its packed rows take, the reply's included."""
    agent = packed.agent(variant)
    info = agent.engine.info.kv_packing
    assert info is not None
    stream = talk(agent, WHOLE, mode="stream")
    for number in range(2):
        stream.step(number)
        rows = state_of(stream).rows
        known = sum(meta.nbytes for meta in rows.row_meta)
        assert rows.nbytes - known == int(rows.lengths.mean()) * info.bytes_per_row


@pytest.mark.parametrize("variant", SOME)
def test_the_window_slides_over_packed_screenshots(packed: PackedEngines, variant: str) -> None:
    stream = talk(packed.agent(variant), WHOLE, mode="stream", screenshots=2)
    for number in range(4):
        stream.step(number)
        metas = state_of(stream).rows.row_meta
        shown = {int(frame) for meta in metas for frame in meta[:, ROW_FRAME]} - {-1}
        assert shown == set(range(max(0, number - 1), number + 1))
    assert state_of(stream).evicted_tokens == 2 * TOKENS


@pytest.mark.parametrize("variant", SOME)
def test_memory_is_constant_under_a_capacity(packed: PackedEngines, variant: str) -> None:
    stream, kept = talk(packed.agent(variant), compacting(80), mode="stream"), set()
    parked = set()
    for number in range(8):
        stream.step(number, most=2)
        if number >= 3:
            kept.add(stream.session.timings.kv_bytes_kept)
            parked.add(state_of(stream).rows.nbytes)
    # Layers share a budget of rows; their latents differ in size.
    assert max(kept) - min(kept) <= (0 if variant in QUANTIZED else max(kept) // 20)
    assert max(parked) - min(parked) <= 2 * max(parked) // 80


def test_a_stream_may_turn_from_packed_to_exact_and_back(packed: PackedEngines) -> None:
    """``--kv-quant none`` on a packed engine goes on from packed rows, and the other way round."""
    for first, second in ((None, False), (False, None)):
        stream = talk(packed.agent("int8"), KvPolicy(packed=first), mode="stream")
        stream.step(0)
        assert state_of(stream).rows.packed is (first is None)
        stream.session.kv_policy = KvPolicy(packed=second)
        stream.step(1)
        assert stream.session.reused_tokens > 0
        assert state_of(stream).rows.packed is (second is None)


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
            assert scheduler.status().parked_bytes == state_of(alone).rows.nbytes


class WatchedMemory:
    """Notes the most that was ever allocated, and the most that was reserved for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.excess = 0
        self.most = 0
        original = KvMemory.slot

        def slot(memory: KvMemory, turn: object) -> object:
            pool = original(memory, turn)  # type: ignore[arg-type]
            self.look(memory)
            return pool

        monkeypatch.setattr(KvMemory, "slot", slot)

    def look(self, memory: KvMemory) -> None:
        allocated = sum(pool.pool.kv.bytes_reserved for pool in memory.pools)
        promised = sum(pool.promised_bytes for pool in memory.pools)
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
        memory: KvMemory = scheduler._memory
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
