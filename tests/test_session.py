# SPDX-License-Identifier: Apache-2.0
"""A whole reply: the same text as transformers' ``generate``, in pieces, with its cost counted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ChatModel, TinyModel
from PIL import Image
from tiny_chat import END_OF_TEXT, IMAGE_PAD

from starkv.errors import ImageError, UsageError
from starkv.runtime.actions.types import Click, Point
from starkv.runtime.agent import Agent
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import preprocess
from starkv.runtime.preprocess.tokenizer import Message, expand_image_tokens
from starkv.runtime.session import Session

LENGTH = 24


@pytest.fixture(scope="module")
def agent(babbling: ChatModel) -> Agent:
    return Agent.load(babbling.engine, threads=1)


@pytest.fixture(scope="module")
def clicker(reciting: ChatModel) -> Agent:
    return Agent.load(reciting.engine, threads=1)


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def question(images: int, text: str = "click the red star") -> list[Message]:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


def ask(agent: Agent, images: list[Image.Image], **parameters: object) -> tuple[Session, list[str]]:
    session = Session(agent.engine, agent.tokenizer)
    chosen = SamplingParameters(**{"max_new_tokens": LENGTH, **parameters})  # type: ignore[arg-type]
    return session, list(session.reply(question(len(images)), images, chosen))


def generated_by_transformers(tiny: TinyModel, agent: Agent, images: list[Image.Image]) -> list[int]:
    """Greedy tokens of HF's ``generate`` for the same prompt, without the end token."""
    manifest = agent.engine.manifest
    inputs = [preprocess(image, manifest.vision, manifest.image) for image in images]
    counts = [image.merged_grid[0] * image.merged_grid[1] for image in inputs]
    ids = agent.tokenizer.encode(agent.tokenizer.render(question(len(images))))
    tokens = torch.tensor([expand_image_tokens(ids, IMAGE_PAD, counts)])
    seen = {}
    if inputs:
        seen = {
            "pixel_values": torch.from_numpy(np.concatenate([image.pixel_values for image in inputs])),
            "image_grid_thw": torch.tensor([[1, image.grid_h, image.grid_w] for image in inputs]),
            "mm_token_type_ids": (tokens == IMAGE_PAD).int(),
        }
    output = tiny.model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=END_OF_TEXT,
        pad_token_id=0,
        **seen,
    )
    return [token for token in output[0, tokens.shape[1] :].tolist() if token != END_OF_TEXT]


@pytest.mark.parametrize(
    "sizes",
    [[], [(200, 150)], [(97, 300)], [(200, 150), (60, 170)]],
    ids=["text", "image", "tall", "two images"],
)
def test_greedy_reply_is_that_of_transformers(
    tiny: TinyModel, agent: Agent, sizes: list[tuple[int, int]]
) -> None:
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    expected = generated_by_transformers(tiny, agent, images)
    assert len(set(expected)) > 1, "a reply of one token over and over would prove little"
    session, pieces = ask(agent, images)
    assert "".join(pieces) == agent.tokenizer.decode(expected)
    assert session.timings.generated_tokens == len(expected)


def test_the_image_matters(agent: Agent) -> None:
    """Otherwise the comparison with transformers would not see the vision tower."""
    replies = {"".join(ask(agent, [noise(200, 150, seed)])[1]) for seed in range(3)}
    assert len(replies) == 3


def test_pieces_join_to_the_reply(agent: Agent, screenshot: Path) -> None:
    heard: list[str] = []
    reply = agent.act(screenshot, "click", SamplingParameters(40), on_text=heard.append)
    assert "".join(heard) == reply.text
    assert len(heard) > 10
    assert all(heard)


def test_account_of_a_reply(agent: Agent) -> None:
    session, _ = ask(agent, [noise(200, 150, 0)])
    timings, info = session.timings, agent.engine.info
    # 196 x 140 pixels after resizing, one token per 28 x 28.
    assert timings.image_tokens == 35
    ids = agent.tokenizer.encode(agent.tokenizer.render(question(1)))
    assert timings.prompt_tokens == len(ids) + 34
    assert timings.kv_tokens_full == timings.kv_tokens_kept == timings.prompt_tokens
    # The last token is said and never fed back.
    rows = timings.prompt_tokens + timings.generated_tokens - 1
    assert timings.kv_bytes_held == rows * info.kv_bytes_per_row
    capacities = [64 * -(-n // 64) for n in (timings.prompt_tokens, timings.prompt_tokens + LENGTH)]
    assert timings.kv_bytes_reserved == sum(capacities) * info.kv_bytes_per_row
    for stage in ("preprocess", "vision", "prefill", "compress", "decode"):
        assert getattr(timings, f"{stage}_ms") > 0
    assert timings.prefill_per_second == pytest.approx(1e3 * timings.prompt_tokens / timings.prefill_ms)
    steps = timings.generated_tokens - 1
    assert timings.decode_per_second == pytest.approx(1e3 * steps / timings.decode_ms)


def test_reply_ends_with_the_end_token(clicker: Agent) -> None:
    session, pieces = ask(clicker, [noise(200, 150, 0)])
    assert "".join(pieces) == "Action: click(start_box='(56,28)')"
    assert session.finish_reason == "stop"
    assert session.timings.generated_tokens == 4


@pytest.mark.parametrize("limit", [1, 3])
def test_reply_ends_at_the_limit(clicker: Agent, limit: int) -> None:
    session, pieces = ask(clicker, [], max_new_tokens=limit)
    assert session.finish_reason == "length"
    assert session.timings.generated_tokens == limit
    assert (
        "".join(pieces) == {1: "Action: click(start_box='(", 3: "Action: click(start_box='(56,28)')"}[limit]
    )


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("'(56", "Action: click(start_box="),
        ("click", "Action: "),
        ("8)", "Action: click(start_box='(56,2"),
        ("A", ""),
    ],
)
def test_reply_ends_before_a_stop_string(clicker: Agent, stop: str, text: str) -> None:
    session, pieces = ask(clicker, [], stop=("never", stop))
    assert "".join(pieces) == text
    assert session.finish_reason == "stop"


def test_beginning_of_a_stop_string_is_given_out_in_the_end(clicker: Agent) -> None:
    session, pieces = ask(clicker, [], stop=("')!",))
    assert "".join(pieces) == "Action: click(start_box='(56,28)')"
    assert session.finish_reason == "stop"


def test_sampling_is_repeatable(agent: Agent) -> None:
    def reply(seed: int) -> str:
        return "".join(ask(agent, [], temperature=2.0, seed=seed)[1])

    assert reply(1) == reply(1)
    assert reply(1) != reply(2)


def test_agent_gives_the_typed_action_on_the_screen(clicker: Agent, screenshot: Path) -> None:
    reply = clicker.act(screenshot, "click the red star")
    assert reply.actions == (Click(Point(56, 28)),)
    assert (tuple(reply.resized), tuple(reply.original)) == ((196, 140), (200, 150))
    assert reply.to_json()["model_xy"] == [56, 28]
    assert reply.to_json()["screen_xy"] == [57.14, 30]
    assert reply.to_json()["error"] is None


def test_agent_reports_a_reply_that_is_no_action(agent: Agent, screenshot: Path) -> None:
    reply = agent.act(screenshot, "click", SamplingParameters(8))
    assert reply.actions == ()
    assert reply.error is not None
    assert reply.error.text == reply.text
    assert reply.to_json()["action"] is None
    assert reply.finish_reason == "length"


def refuse(*_: object) -> None:
    raise AssertionError("an expensive step ran before the prompt was checked")


@pytest.mark.parametrize(
    ("kind", "ask_wrongly", "message"),
    [
        (UsageError, lambda session: session.reply(question(2), [noise(60, 60, 0)]), "2 image placeholders"),
        (UsageError, lambda session: session.reply(question(0), [noise(60, 60, 0)]), "0 image placeholders"),
        (UsageError, lambda session: session.reply(question(0, "star " * 600), []), "was built for 512"),
        (ImageError, lambda session: session.reply(question(1), [noise(900, 3, 0)]), "too narrow"),
    ],
)  # fmt: skip
def test_what_can_be_refused_costs_nothing(
    agent: Agent,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Exception],
    ask_wrongly: Callable[[Session], list[str]],
    message: str,
) -> None:
    for step in ("encode_image", "prefill", "new_arena", "new_pool"):
        monkeypatch.setattr(agent.engine, step, refuse)
    with pytest.raises(kind, match=message):
        list(ask_wrongly(Session(agent.engine, agent.tokenizer)))
    with pytest.raises(UsageError, match="no KV method 'magic'; it has: full"):
        list(Session(agent.engine, agent.tokenizer, KvPolicy("magic")).reply(question(0), []))


def test_the_longest_prompt_that_fits_is_answered(agent: Agent) -> None:
    overhead = len(agent.tokenizer.encode(agent.tokenizer.render(question(0, ""))))
    fitting = agent.engine.manifest.max_context - overhead - 2
    session = Session(agent.engine, agent.tokenizer)
    list(session.reply(question(0, "!" * fitting), [], SamplingParameters(2)))
    assert session.timings.prompt_tokens == agent.engine.manifest.max_context - 2
    with pytest.raises(UsageError, match="need 513 KV rows"):
        list(session.reply(question(0, "!" * fitting), [], SamplingParameters(3)))
