# SPDX-License-Identifier: Apache-2.0
"""Stream mode: a step costs one screenshot, and says what the whole history would have said."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ChatModel
from PIL import Image

from starkv.errors import EngineError, UsageError
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.methods.rows import ROW_FRAME, ROW_PROTECTED, ROW_TOKEN
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.stream_rows import StreamRows
from starkv.runtime.agent import Agent
from starkv.runtime.engines.torch_reference import TorchReferenceEngine
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.positions import prompt_positions
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.session import Session
from starkv.runtime.session_file import load_session, save_session
from starkv.runtime.stream import Continuation, StreamState, continuation

LENGTH = 6
TOKENS = 35
"""Of a screenshot of 200x150 pixels: 196x140 after resizing, one token per 28x28."""
WHOLE = KvPolicy(FULL)


@pytest.fixture(scope="module")
def agent(babbling: ChatModel) -> Agent:
    return Agent.load(babbling.engine, threads=1)


def noise(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def turn(text: str, images: int = 1) -> Message:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


class Conversation:
    """A client that sends the whole conversation every time, as the OpenAI protocol wants it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.messages: list[Message] = [{"role": "system", "content": "you click"}]
        self.images: list[Image.Image] = []

    def step(self, number: int, text: str = "", most: int = LENGTH, shown: int = 1) -> str:
        self.images += [noise(number * 10 + extra) for extra in range(shown)]
        self.messages.append(turn(text, shown))
        reply = "".join(self.session.reply(self.messages, self.images, SamplingParameters(most)))
        self.messages.append({"role": "assistant", "content": reply})
        return reply


def talk(agent: Agent, policy: KvPolicy, **options: object) -> Conversation:
    return Conversation(Session(agent.engine, agent.tokenizer, policy, **options))  # type: ignore[arg-type]


def compacting(rows: int) -> KvPolicy:
    return KvPolicy(STAR_KV, Budget(capacity=rows))


def written_as_said(agent: Agent, conversation: Conversation) -> bool:
    """Whether the random model's replies are tokenized again as it said them. Half a character is not, and
    then prompt mode sees other tokens than the model picked."""
    state = conversation.session.state
    assert state is not None
    ids = agent.tokenizer.encode(state.text)
    return len(ids) + len(state.image_keys) * (TOKENS - 1) == state.tokens


@pytest.mark.parametrize(
    "policy",
    [WHOLE, KvPolicy(STAR_KV, Budget(1.0)), compacting(10_000)],
    ids=["full", "budget 1.0", "capacity never reached"],
)
def test_without_eviction_a_stream_says_what_the_whole_history_says(agent: Agent, policy: KvPolicy) -> None:
    compared, replies = 0, set()
    for seed in range(0, 1000, 40):
        stream, prompt = talk(agent, policy, mode="stream"), talk(agent, WHOLE)
        for number in range(3):
            text = "click the red star" if number == 0 else ""
            said = stream.step(seed + number, text, most=2)
            assert said == prompt.step(seed + number, text, most=2)
            whole, part = prompt.session.timings, stream.session.timings
            if not written_as_said(agent, stream):
                break
            compared += number
            replies.add(said)
            assert part.kv_tokens_full == whole.kv_tokens_full
            assert part.prompt_tokens + stream.session.reused_tokens == whole.prompt_tokens
            assert number == 0 or part.prompt_tokens < 2 * TOKENS < whole.prompt_tokens
    assert compared >= 6
    assert len(replies) > 4, "the same reply over and over would prove little"


def test_cut_off_replies_go_on_where_they_were_cut(agent: Agent) -> None:
    """The last token was said and never decoded: the next turn has to begin with it."""
    stream, prompt = talk(agent, WHOLE, mode="stream"), talk(agent, WHOLE)
    for number, most in enumerate((1, 3, 2, 5)):
        assert stream.step(number, most=most) == prompt.step(number, most=most)
        assert stream.session.finish_reason == "length"
        assert stream.session.reused_tokens > 0 or number == 0


def test_positions_are_those_of_the_whole_conversation(agent: Agent) -> None:
    for seed in range(0, 1000, 40):
        stream = talk(agent, compacting(60), mode="stream")
        for number in range(3):
            stream.step(seed + number, most=1)
        if written_as_said(agent, stream):
            break
    assert written_as_said(agent, stream)
    manifest, state = agent.engine.manifest, stream.session.state
    assert state is not None
    ids: list[int] = []
    for token in agent.tokenizer.encode(state.text):
        ids += [token] * (TOKENS if token == manifest.tokens.image_pad else 1)
    whole = prompt_positions(ids, manifest.tokens.image_pad, [(5, 7)] * 3, manifest.text)
    # The last token of a reply that was cut off has no row yet.
    assert state.next_position == whole.next_position - len(state.pending)
    assert state.tokens == len(ids)


def test_memory_is_constant_under_a_capacity(agent: Agent) -> None:
    stream, held, reserved = talk(agent, compacting(80), mode="stream"), set(), set()
    for number in range(14):
        stream.step(number)
        state, timings = stream.session.state, stream.session.timings
        assert state is not None
        assert timings.kv_tokens_kept <= 80
        if number >= 3:
            held.add(timings.kv_bytes_kept)
            reserved.add(timings.kv_bytes_reserved)
    assert len(held) == len(reserved) == 1
    assert state.tokens > 14 * TOKENS


def test_a_share_is_of_what_is_in_view_and_not_of_what_is_left(agent: Agent) -> None:
    stream = talk(agent, KvPolicy(STAR_KV, Budget(0.5)), mode="stream", screenshots=3)
    for number in range(8):
        stream.step(number)
        state, rows = stream.session.state, stream.session.prompt
        assert state is not None
        assert rows is not None
        in_view = min(number + 1, 3) * TOKENS
        text = rows.full_rows - in_view
        assert 0 < text < 40 + 25 * number
        assert stream.session.timings.kv_tokens_kept == pytest.approx((in_view + text) // 2, abs=1)


def test_protected_rows_stay_in_every_layer(agent: Agent) -> None:
    stream = talk(agent, compacting(150), mode="stream")
    stream.step(0, "click the red star on the blue button")
    first = stream.session.prompt
    assert first is not None
    wanted = set(first.protected(150, StarKVConfig().window))
    assert len(wanted) > 20
    for number in range(1, 12):
        stream.step(number)
    state = stream.session.state
    assert state is not None
    for meta in state.rows.row_meta:
        assert wanted <= set(meta[meta[:, ROW_PROTECTED] == 1, ROW_TOKEN].tolist())


def test_rows_know_what_they_are_after_many_steps(agent: Agent) -> None:
    stream = talk(agent, compacting(90), mode="stream")
    for number in range(6):
        stream.step(number)
    state = stream.session.state
    assert state is not None
    for meta in state.rows.row_meta:
        tokens = meta[:, ROW_TOKEN]
        assert (np.diff(tokens) > 0).all()
        assert tokens[-1] == state.tokens - len(state.pending) - 1
        # Each screenshot's tokens come one after the other, in the order of its cells.
        for frame in np.unique(meta[meta[:, ROW_FRAME] >= 0, ROW_FRAME]):
            own = meta[meta[:, ROW_FRAME] == frame]
            assert len(np.unique(own[:, ROW_TOKEN] - own[:, 1])) == 1


def test_the_window_slides_over_the_oldest_screenshot(agent: Agent) -> None:
    stream = talk(agent, WHOLE, mode="stream", screenshots=2)
    for number in range(5):
        stream.step(number)
        state = stream.session.state
        assert state is not None
        shown = {int(frame) for meta in state.rows.row_meta for frame in meta[:, ROW_FRAME]} - {-1}
        assert shown == set(range(max(0, number - 1), number + 1))
    assert state.evicted_tokens == 3 * TOKENS


def test_evicted_screenshots_are_not_attended_to(agent: Agent) -> None:
    """A stream whose old screenshots were other ones says the same once they have left the window, all else
    being equal: text rows saw them, so only the newest rows can be compared through a fresh conversation."""
    state = []
    for seed in (1, 2):
        stream = talk(agent, WHOLE, mode="stream", screenshots=1)
        stream.images.append(noise(seed))
        stream.messages.append(turn(""))
        "".join(stream.session.reply(stream.messages, stream.images, SamplingParameters(1)))
        assert stream.session.state is not None
        state.append(stream.session.state.rows.without_frames_before(1))
    for layer in range(len(state[0].keys)):
        assert state[0].keys[layer].shape == state[1].keys[layer].shape
        # Rows in front of the screenshot never saw it.
        np.testing.assert_array_equal(state[0].keys[layer][:, :8], state[1].keys[layer][:, :8])


def test_another_conversation_begins_a_new_stream(agent: Agent) -> None:
    stream = talk(agent, WHOLE, mode="stream")
    stream.step(0)
    other = Conversation(stream.session)
    other.messages = [{"role": "system", "content": "you type"}]
    fresh = talk(agent, WHOLE)
    fresh.messages = [{"role": "system", "content": "you type"}]
    assert other.step(5) == fresh.step(5)
    assert stream.session.reused_tokens == 0


def test_another_screenshot_in_the_history_is_another_conversation(agent: Agent) -> None:
    stream = talk(agent, WHOLE, mode="stream")
    stream.step(0)
    stream.images[0] = noise(99)
    stream.step(1)
    assert stream.session.reused_tokens == 0


@pytest.mark.parametrize("whole_turns", [False, True], ids=["only the images", "their turns too"])
def test_clients_may_leave_out_the_oldest_screenshots(agent: Agent, whole_turns: bool) -> None:
    """UI-TARS's own client sends the last five only."""
    everything = talk(agent, WHOLE, mode="stream")
    few = talk(agent, WHOLE, mode="stream")
    for number in range(4):
        if number >= 2:
            few.images.pop(0)
            oldest = next(i for i, m in enumerate(few.messages) if "image" in str(m["content"]))
            if whole_turns:
                few.messages.pop(oldest)
            else:
                few.messages[oldest] = {"role": "user", "content": [{"type": "text", "text": ""}]}
        assert few.step(number) == everything.step(number)
        assert few.session.reused_tokens == everything.session.reused_tokens
    assert len(few.images) == 2


def test_the_reference_engine_keeps_the_same_rows(agent: Agent, babbling: ChatModel) -> None:
    reference = TorchReferenceEngine.load(babbling.engine, babbling.checkpoint)
    own = talk(agent, compacting(80), mode="stream")
    other = talk(Agent(reference, agent.tokenizer), compacting(80), mode="stream")
    for number in range(4):
        assert own.step(number, most=1) == other.step(number, most=1)
        mine, theirs = own.session.state, other.session.state
        assert mine is not None
        assert theirs is not None
        for layer, (meta, expected) in enumerate(zip(mine.rows.row_meta, theirs.rows.row_meta, strict=True)):
            np.testing.assert_array_equal(meta, expected)
            np.testing.assert_allclose(mine.rows.keys[layer], theirs.rows.keys[layer], atol=2e-4)
    assert isinstance(own.session.prompt, StreamRows)


def test_star_kv_remembers_the_stream(agent: Agent) -> None:
    stream = talk(agent, compacting(80), mode="stream")
    for number in range(4):
        stream.step(number)
        assert stream.session.state is not None
        memory = stream.session.state.memory
        assert memory is not None
        assert memory.progress.temporal_step == number + 1
    # The window, five rows of text and the reply's start, reaches over the screenshot's last token.
    assert TOKENS - StarKVConfig().window < memory.progress.pattern_cells <= TOKENS


@pytest.mark.parametrize("method", ["snapkv", "streaming_llm", "random"])
def test_methods_without_streams_say_so(agent: Agent, method: str) -> None:
    stream = talk(agent, KvPolicy(method, Budget(0.4)), mode="stream")
    stream.step(0)
    with pytest.raises(UsageError, match=r"whole prompts only.*star_kv"):
        stream.step(1)


def test_official_mode_has_no_streams(agent: Agent) -> None:
    stream = talk(agent, KvPolicy(STAR_KV, Budget(0.4), StarKVConfig.official()), mode="stream")
    stream.step(0)
    with pytest.raises(UsageError, match="native mode"):
        stream.step(1)


def test_a_saved_session_goes_on_as_if_nothing_had_happened(agent: Agent, tmp_path: Path) -> None:
    policy, path = compacting(80), tmp_path / "session.safetensors"
    stream = talk(agent, policy, mode="stream", screenshots=3)
    for number in range(4):
        stream.step(number)
    assert stream.session.state is not None
    save_session(stream.session.state, agent.engine.manifest, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    restored = talk(agent, policy, mode="stream", screenshots=3)
    restored.messages, restored.images = list(stream.messages), list(stream.images)
    restored.session.state = load_session(path, agent.engine.manifest)
    for number in range(4, 7):
        assert restored.step(number) == stream.step(number)
        assert restored.session.reused_tokens == stream.session.reused_tokens > 0


def test_bad_session_files(agent: Agent, tmp_path: Path) -> None:
    manifest, path = agent.engine.manifest, tmp_path / "session.safetensors"
    with pytest.raises(EngineError, match=r"session\.safetensors is missing"):
        load_session(path, manifest)
    path.write_bytes(b"no session")
    with pytest.raises(EngineError, match=r"session\.safetensors is damaged"):
        load_session(path, manifest)
    stream = talk(agent, WHOLE, mode="stream")
    stream.step(0)
    assert stream.session.state is not None
    save_session(stream.session.state, manifest, path)
    other = manifest.model_copy(update={"quantization": "int4"})
    with pytest.raises(EngineError, match="another engine"):
        load_session(path, other)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match="damaged"):
        load_session(path, manifest)
    with pytest.raises(UsageError, match="can't be written"):
        save_session(stream.session.state, manifest, tmp_path / "none" / "session.safetensors")


def test_repeated_screenshots_are_encoded_once(agent: Agent) -> None:
    prompt = talk(agent, WHOLE)
    for number in range(3):
        prompt.step(number)
    assert prompt.session.image_cache.hits == 1 + 2


def test_ui_tars_conversations_go_on() -> None:
    """Their past answers carry special tokens that vanish when a reply is decoded, and lose old screenshots
    with their turns."""
    placeholder = "<|image_pad|>"
    shown = f"<|im_start|>user\n<|vision_start|>{placeholder}<|vision_end|><|im_end|>\n"
    said = "<|im_start|>assistant\nAction: click(start_box='{}')"
    keys = (b"1", b"2")
    state = StreamState(
        rows=ParkedRows.none(),
        text="begin " + shown + said.format("(1,2)") + "<|im_end|>\n" + shown + said.format("(3,4)"),
        image_keys=keys,
        pending=(),
        next_position=0,
        tokens=0,
        frames=(),
        protect_order=(),
    )
    boxes = said.format("<|box_start|>(3,4)<|box_end|>")
    whole = "begin " + shown + said.format("(1,2)") + "<|im_end|>\n" + shown + boxes + "<|im_end|>\n" + shown
    found = continuation(state, whole, (*keys, b"3"), placeholder)
    assert found == Continuation("<|im_end|>\n" + shown, 2)
    few = "begin " + said.format("(1,2)") + "<|im_end|>\n" + shown + boxes + "<|im_end|>\n" + shown
    assert continuation(state, few, (b"2", b"3"), placeholder) == Continuation("<|im_end|>\n" + shown, 1)
    assert continuation(state, few, (b"1", b"3"), placeholder) is None
    assert continuation(state, few.replace("(3,4)", "(3,5)"), (b"2", b"3"), placeholder) is None
    assert continuation(state, few[:40], (b"2",), placeholder) is None
