# SPDX-License-Identifier: Apache-2.0
"""A stream's newest screenshot stays whole until the next one was read behind it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ChatModel
from packed_engines import PackedEngines
from test_scheduler import asked, running, submit
from test_stream import TOKENS, WHOLE, Conversation, agent, compacting, talk

from starkv.errors import UsageError
from starkv.methods.rows import ROW_FRAME, ROW_TOKEN
from starkv.methods.stream_rows import StreamRows
from starkv.runtime.agent import Agent
from starkv.runtime.engines.torch_reference import TorchReferenceEngine
from starkv.runtime.kv.buffers import round_up_rows
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.serving.sessions import ParkedSessions
from starkv.runtime.session_file import load_session, save_session
from starkv.runtime.stream import StreamState
from starkv.runtime.stream_plan import append_to_stream
from starkv.runtime.turn_plan import fitted

__all__ = ["agent"]

ROWS = 40
"""Fewer than a screenshot and its text."""


def state_of(conversation: Conversation) -> StreamState:
    assert conversation.session.state is not None
    return conversation.session.state


def waiting_of(conversation: Conversation) -> ParkedRows:
    waiting = state_of(conversation).waiting
    assert waiting is not None
    return waiting


def frame_rows(meta: np.ndarray, frame: int) -> int:
    return int((meta[..., ROW_FRAME] == frame).sum())


def test_every_row_of_the_newest_screenshot_is_kept_or_waits(agent: Agent) -> None:
    stream = talk(agent, compacting(ROWS), mode="stream")
    for number in range(4):
        stream.step(number)
        state, waiting = state_of(stream), waiting_of(stream)
        for meta, more in zip(state.rows.row_meta, waiting.row_meta, strict=True):
            assert set(more[:, ROW_FRAME].tolist()) == {number}
            assert frame_rows(meta, number) + len(more) == TOKENS
            assert not set(meta[:, ROW_TOKEN].tolist()) & set(more[:, ROW_TOKEN].tolist())
        assert state.nbytes == state.rows.nbytes + waiting.nbytes
        row = sum(array.nbytes for array in (waiting.keys[0][:, :1], waiting.values[0][:, :1]))
        assert stream.session.timings.kv_bytes_waiting == row * waiting.lengths.sum()


def test_rows_that_wait_are_the_prefilled_ones(agent: Agent) -> None:
    stream, exact = talk(agent, compacting(ROWS), mode="stream"), talk(agent, WHOLE, mode="stream")
    for conversation in (stream, exact):
        conversation.step(0, most=1)
    waiting, whole = waiting_of(stream), state_of(exact).rows
    for layer, meta in enumerate(waiting.row_meta):
        # Without eviction a token's row is its number.
        tokens = meta[:, ROW_TOKEN]
        assert len(tokens) > 5
        np.testing.assert_array_equal(waiting.keys[layer], whole.keys[layer][:, tokens])
        np.testing.assert_array_equal(waiting.values[layer], whole.values[layer][:, tokens])
        np.testing.assert_array_equal(waiting.positions[layer], whole.positions[layer][tokens])


def test_the_next_turn_is_read_behind_them(agent: Agent) -> None:
    """A history of which some rows wait is as good as the whole."""
    exact, stream, short = (talk(agent, WHOLE, mode="stream") for _ in range(3))
    for conversation in (exact, stream, short):
        conversation.step(0, most=3)
    state = state_of(stream)
    # Other rows in every layer, so that layers are of different lengths.
    waits = [
        (meta[:, ROW_FRAME] == 0) & (meta[:, ROW_TOKEN] % (layer + 2) == 0)
        for layer, meta in enumerate(state.rows.row_meta)
    ]
    rows, waiting = (
        state.rows.take([np.flatnonzero(mask == wanted) for mask in waits]) for wanted in (False, True)
    )
    assert waiting.lengths.min() > 2
    stream.session.state = replace(state, rows=rows, waiting=waiting)
    short.session.state = replace(state, rows=rows)
    assert stream.step(1) == exact.step(1)
    short.step(1)
    mine, theirs, fewer = (state_of(conversation).rows for conversation in (stream, exact, short))
    for layer in range(len(mine.keys)):
        np.testing.assert_array_equal(mine.row_meta[layer], theirs.row_meta[layer])
        np.testing.assert_array_equal(mine.keys[layer], theirs.keys[layer])
        np.testing.assert_array_equal(mine.values[layer], theirs.values[layer])
        np.testing.assert_array_equal(mine.positions[layer], theirs.positions[layer])
    np.testing.assert_array_equal(mine.lengths - fewer.lengths, waiting.lengths)


def test_only_one_screenshot_waits_and_the_budget_stays(agent: Agent) -> None:
    stream = talk(agent, compacting(80), mode="stream")
    bytes_waiting, kept = set(), set()
    for number in range(8):
        stream.step(number)
        timings = stream.session.timings
        assert timings.kv_tokens_kept <= 80
        if number >= 3:
            bytes_waiting.add(timings.kv_bytes_waiting)
            kept.add(timings.kv_bytes_kept)
            assert isinstance(stream.session.prompt, StreamRows)
            before = stream.session.prompt.history_meta
            assert all(frame_rows(meta, number - 1) == TOKENS for meta in before)
            assert any(frame_rows(meta, number - 2) < TOKENS for meta in before)
    assert len(kept) == 1
    row = agent.engine.info.kv_bytes_per_row
    assert 0 < max(bytes_waiting) <= TOKENS * row


def test_a_turn_of_words_alone_leaves_the_screenshot_whole(agent: Agent) -> None:
    stream = talk(agent, compacting(ROWS), mode="stream")
    stream.step(0)
    stream.step(1, "click the red star", shown=0)
    for meta, more in zip(state_of(stream).rows.row_meta, waiting_of(stream).row_meta, strict=True):
        assert frame_rows(meta, 0) + frame_rows(more, 0) == TOKENS


def test_compacted_at_once_where_that_is_wanted(agent: Agent) -> None:
    stream = talk(agent, compacting(ROWS), mode="stream", newest_whole=False)
    for number in range(3):
        stream.step(number)
        assert state_of(stream).waiting is None
        assert stream.session.timings.kv_bytes_waiting == 0
        assert all(frame_rows(meta, number) < TOKENS for meta in state_of(stream).rows.row_meta)


@pytest.mark.parametrize("policy", [WHOLE, compacting(10_000)], ids=["full", "capacity never reached"])
def test_without_eviction_nothing_waits(agent: Agent, policy: KvPolicy) -> None:
    stream = talk(agent, policy, mode="stream")
    for number in range(2):
        stream.step(number)
        assert state_of(stream).waiting is None


def test_they_leave_with_their_screenshot(agent: Agent) -> None:
    stream = talk(agent, compacting(ROWS), mode="stream", screenshots=1)
    for number in range(3):
        stream.step(number)
        assert {int(f) for meta in waiting_of(stream).row_meta for f in meta[:, ROW_FRAME]} == {number}
        if number:
            assert isinstance(stream.session.prompt, StreamRows)
            assert not (stream.session.prompt.history_meta[..., ROW_FRAME] >= 0).any()


def test_they_are_let_go_where_there_is_no_room(agent: Agent) -> None:
    stream = talk(agent, compacting(ROWS), mode="stream")
    stream.step(0)
    state, manifest = state_of(stream), agent.engine.manifest
    plan = append_to_stream(manifest, agent.tokenizer, state, "<|im_end|>\nand now?", [])
    assert plan.waiting is state.waiting
    with_all, without = plan.arena_rows, plan.without_waiting().arena_rows
    assert without < with_all
    roomy, tight, full = (
        manifest.model_copy(update={"max_context": rows + 5}) for rows in (with_all, without, without - 1)
    )
    assert fitted(plan, 5, roomy) is plan
    assert fitted(plan, 5, tight).waiting is None
    assert fitted(plan, 5, tight).arena_rows == without
    np.testing.assert_array_equal(fitted(plan, 5, tight).rows.lengths - len(plan.ids), state.rows.lengths)
    with pytest.raises(UsageError, match=f"{without} prompt tokens"):
        fitted(plan, 5, full)


def test_a_file_holds_them(agent: Agent, tmp_path: Path) -> None:
    stream, path = talk(agent, compacting(ROWS), mode="stream"), tmp_path / "session.safetensors"
    stream.step(0)
    for waiting in (waiting_of(stream), None):
        save_session(replace(state_of(stream), waiting=waiting), agent.engine.manifest, path)
        loaded = load_session(path, agent.engine.manifest).waiting
        if waiting is None:
            assert loaded is None
            continue
        assert loaded is not None
        for name in ("keys", "values", "row_meta", "positions"):
            for mine, theirs in zip(getattr(loaded, name), getattr(waiting, name), strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_the_reference_engine_lets_the_same_rows_wait(agent: Agent, babbling: ChatModel) -> None:
    reference = TorchReferenceEngine.load(babbling.engine, babbling.checkpoint)
    own = talk(agent, compacting(80), mode="stream")
    other = talk(Agent(reference, agent.tokenizer), compacting(80), mode="stream")
    for number in range(3):
        assert own.step(number, most=1) == other.step(number, most=1)
        if number == 0:
            continue
        mine, theirs = waiting_of(own), waiting_of(other)
        for layer, (meta, expected) in enumerate(zip(mine.row_meta, theirs.row_meta, strict=True)):
            np.testing.assert_array_equal(meta[:, ROW_TOKEN], expected[:, ROW_TOKEN])
            np.testing.assert_allclose(mine.keys[layer], theirs.keys[layer], atol=2e-4)


@pytest.mark.parametrize("variant", ["int8", "rank 0.5 int4"])
def test_packed_streams_go_on_behind_exact_rows(packed: PackedEngines, variant: str) -> None:
    stream = talk(packed.agent(variant), compacting(ROWS), mode="stream")
    for number in range(3):
        stream.step(number)
        assert state_of(stream).rows.packed
        assert not waiting_of(stream).packed
        if number:
            assert isinstance(stream.session.prompt, StreamRows)
            before = stream.session.prompt.history_meta
            assert all(frame_rows(meta, number - 1) == TOKENS for meta in before)


def test_rows_of_other_caches_are_not_merged(agent: Agent, packed: PackedEngines) -> None:
    exact, codes = talk(agent, WHOLE, mode="stream"), talk(packed.agent("int8"), WHOLE, mode="stream")
    for conversation in (exact, codes):
        conversation.step(0, most=1)
    with pytest.raises(ValueError, match="can't be merged"):
        state_of(codes).rows.merged(state_of(exact).rows)


@pytest.mark.parametrize("newest_whole", [True, False])
def test_served_sessions_do_as_sessions_alone(agent: Agent, newest_whole: bool) -> None:
    policy = compacting(ROWS)
    alone = talk(agent, policy, mode="stream", newest_whole=newest_whole)
    with running(agent.engine, agent.tokenizer, newest_whole=newest_whole) as scheduler:
        for number in range(3):
            reply = alone.step(number, most=4)
            messages, images = alone.messages[:-1], list(alone.images)
            request = asked("", 4, images, messages=messages, session_id="a", policy=policy)
            listener = submit(scheduler, request)[1].wait()
            assert listener.text == reply
            assert listener.end.timings.kv_bytes_waiting == alone.session.timings.kv_bytes_waiting
            assert scheduler.status().parked_bytes == state_of(alone).nbytes
    assert (state_of(alone).waiting is not None) is newest_whole


def test_sessions_larger_than_all_memory_go_without_them(agent: Agent) -> None:
    stream = talk(agent, compacting(ROWS), mode="stream")
    stream.step(0)
    state = state_of(stream)
    for most, expected in ((state.nbytes, state), (state.rows.nbytes, replace(state, waiting=None))):
        parked = ParkedSessions(most)
        parked.keep("a", state)
        assert parked.get("a") == expected
        assert parked.nbytes == expected.nbytes <= most
    too_small = ParkedSessions(state.rows.nbytes - 1)
    too_small.keep("a", state)
    assert too_small.get("a") is None


def test_a_server_without_room_for_them_answers_all_the_same(agent: Agent) -> None:
    policy, most = compacting(ROWS), 4
    roomy, tight = (talk(agent, policy, mode="stream", newest_whole=whole) for whole in (True, False))
    for conversation in (roomy, tight):
        conversation.step(0, most=most)
        conversation.step(1, "so " * 11, most=most)
    lengths = []
    for conversation in (roomy, tight):
        assert conversation.session.prompt is not None
        lengths.append(conversation.session.prompt.length)
    arenas = [round_up_rows(length) for length in lengths]
    assert arenas[0] > arenas[1], lengths
    # Room for the smaller arena and a slot.
    limit = (arenas[1] + 64) * agent.engine.info.kv_bytes_per_row
    with running(agent.engine, agent.tokenizer, kv_bytes=limit, slots=1) as scheduler:
        for number in range(2):
            messages, reply = tight.messages[: 2 + 2 * number], tight.messages[2 + 2 * number]
            request = asked(
                "", most, tight.images[: number + 1], messages=messages, session_id="a", policy=policy
            )
            listener = submit(scheduler, request)[1].wait()
            assert listener.text == reply["content"]
        assert listener.end.reused_tokens == tight.session.reused_tokens > 0
