# SPDX-License-Identifier: Apache-2.0
"""Streams that go on from packed rows, in memory and from files."""

from pathlib import Path

import numpy as np
import pytest
from packed_engines import LOW_RANK, QUANTIZED, PackedEngines
from test_stream import TOKENS, WHOLE, Conversation, compacting, talk

from starkv.errors import EngineError, UsageError
from starkv.methods.rows import ROW_FRAME
from starkv.runtime.kv.policy import KvPolicy
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
