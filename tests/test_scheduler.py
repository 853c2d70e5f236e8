# SPDX-License-Identifier: Apache-2.0
"""Many sessions on one engine: each gets what it would get alone, and nobody waits for long."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from conftest import ChatModel
from fake_engine import FakeEngine
from PIL import Image

from starkv.errors import EngineError, UsageError
from starkv.manifest import Manifest, read_manifest
from starkv.methods.budget import Budget
from starkv.methods.names import FULL, STAR_KV
from starkv.runtime.agent import Agent
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.tokenizer import ChatTokenizer, Message
from starkv.runtime.serving.limits import SchedulerLimits
from starkv.runtime.serving.requests import BusyError, Event, Failed, Finished, GenerationRequest, TextPiece
from starkv.runtime.serving.scheduler import Scheduler
from starkv.runtime.session import Session

PATIENCE = 20.0
"""Seconds after which a test gives up."""


class Listener:
    """Collects one request's events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()
        self.times: list[float] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.times.append(time.monotonic())
        if isinstance(event, (Finished, Failed)):
            self.over.set()

    def wait(self) -> "Listener":
        assert self.over.wait(PATIENCE), f"nothing ended it: {self.events}"
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextPiece))

    @property
    def end(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return last

    @property
    def error(self) -> Exception:
        last = self.events[-1]
        assert isinstance(last, Failed), last
        return last.error


def conversation(text: str, images: int = 0) -> list[Message]:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


def asked(
    text: str, tokens: int = 8, images: Sequence[Image.Image] = (), **options: object
) -> GenerationRequest:
    return GenerationRequest(
        options.pop("messages", None) or conversation(text, len(images)),  # type: ignore[arg-type]
        images,
        SamplingParameters(tokens),
        **{"policy": KvPolicy(FULL), **options},  # type: ignore[arg-type]
    )


def noise(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def manifest(babbling: ChatModel) -> Manifest:
    return read_manifest(babbling.engine).model_copy(update={"max_context": 4096})


@pytest.fixture(scope="module")
def tokenizer(babbling: ChatModel) -> ChatTokenizer:
    return ChatTokenizer.from_directory(babbling.engine)


@pytest.fixture
def engine(manifest: Manifest, tokenizer: ChatTokenizer) -> FakeEngine:
    letters = [tokenizer.encode(letter)[0] for letter in "abcdefghijklmnop"]
    return FakeEngine(manifest, letters)


@contextmanager
def running(engine: object, tokenizer: ChatTokenizer, **limits: int) -> Iterator[Scheduler]:
    scheduler = Scheduler(engine, tokenizer, SchedulerLimits(**limits))  # type: ignore[arg-type]
    try:
        yield scheduler
    finally:
        scheduler.close(PATIENCE)
        assert not scheduler.status().sequences


def submit(scheduler: Scheduler, request: GenerationRequest) -> tuple[int, Listener]:
    listener = Listener()
    return scheduler.submit(request, listener), listener


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


def test_everybody_gets_what_they_would_get_alone(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    requests = [asked(f"question {n * 'x'}", tokens=60 + n, images=[noise(n)] * (n % 3)) for n in range(24)]
    with running(engine, tokenizer, slots=5, queue=100) as scheduler:
        listeners = [submit(scheduler, request)[1] for request in requests]
        together = [listener.wait().text for listener in listeners]
    alone = []
    for request in requests:
        session = Session(engine, tokenizer)  # type: ignore[arg-type]
        alone.append("".join(session.reply(request.messages, request.images, request.parameters)))
    assert together == alone
    assert len(set(alone)) > 15
    widths = [count for name, count in engine.calls if name == "decode"]
    assert max(widths) >= 3, "they decode together"


def test_a_real_engine_answers_many_as_it_answers_one(babbling: ChatModel) -> None:
    agent = Agent.load(babbling.engine, threads=1)
    policy = KvPolicy(STAR_KV, Budget(0.5))
    requests = [asked(f"click {n}", 5, [noise(n)], policy=policy) for n in range(5)]
    with running(agent.engine, agent.tokenizer, slots=3, prefill_rows=16) as scheduler:
        together = [listener.wait().text for _, listener in [submit(scheduler, r) for r in requests]]
    for request, text in zip(requests, together, strict=True):
        session = Session(agent.engine, agent.tokenizer, policy)
        assert text == "".join(session.reply(request.messages, request.images, request.parameters))


def test_a_long_prompt_stalls_nobody_for_more_than_a_chunk(
    engine: FakeEngine, tokenizer: ChatTokenizer
) -> None:
    with running(engine, tokenizer, prefill_rows=16) as scheduler:
        _, talker = submit(scheduler, asked("hi", tokens=400))
        eventually(lambda: len(talker.events) > 3)
        mark = len(engine.calls)
        _, reader = submit(scheduler, asked("long " * 60, tokens=2))
        reader.wait()
        between = [name for name, _ in engine.calls[mark:]]
        scheduler.cancel(1)
        talker.wait()
    prefills = [place for place, name in enumerate(between) if name == "prefill"]
    assert len(prefills) > 10
    # Between two chunks there is always a step for the one that talks.
    assert all("decode" in between[a:b] for a, b in pairwise(prefills))
    assert all(count <= 16 for name, count in engine.calls[mark:] if name == "prefill")


def test_sessions_go_on_from_their_cache(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    with running(engine, tokenizer) as scheduler:
        messages = conversation("first", 1)
        _, first = submit(scheduler, asked("", 4, [noise(1)], messages=messages, session_id="a"))
        first.wait()
        messages = [*messages, {"role": "assistant", "content": first.text}, *conversation("second", 1)]
        images = [noise(1), noise(2)]
        _, second = submit(scheduler, asked("", 4, images, messages=messages, session_id="a"))
        _, other = submit(scheduler, asked("", 4, images, messages=messages, session_id="b"))
        second.wait(), other.wait()
        assert scheduler.status().parked_sessions == 2
    assert second.text == other.text, "the cache holds what was said"
    assert second.end.reused_tokens > 35
    assert other.end.reused_tokens == 0
    assert second.end.timings.prompt_tokens < other.end.timings.prompt_tokens
    assert [name for name, _ in engine.calls].count("encode") == 2


def test_turns_of_one_session_wait_for_each_other(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    engine.step_seconds = 0.002
    with running(engine, tokenizer) as scheduler:
        _, first = submit(scheduler, asked("one", 30, session_id="a"))
        _, second = submit(scheduler, asked("two", 3, session_id="a"))
        _, other = submit(scheduler, asked("three", 3, session_id="b"))
        for listener in (first, second, other):
            listener.wait()
    assert second.times[0] > first.times[-1]
    assert other.times[-1] < first.times[-1], "others do not wait"


def test_parked_sessions_stay_within_their_memory(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    row = engine.info.kv_bytes_per_row
    with running(engine, tokenizer, parked_bytes=120 * row) as scheduler:
        for name in "abcdefgh":
            submit(scheduler, asked(f"session {name}", 4, session_id=name))[1].wait()
            assert scheduler.status().parked_bytes <= 120 * row
        assert 1 <= scheduler.status().parked_sessions < 8


def test_too_many_requests_are_told_to_come_back(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    engine.step_seconds = 0.01
    with running(engine, tokenizer, slots=1, queue=2) as scheduler:
        ids = [submit(scheduler, asked("talk", 200))[0]]
        eventually(lambda: scheduler.status().sequences[0].state == "decode")
        # One more than the queue: it is prefilled already and waits for the slot.
        ids += [submit(scheduler, asked("talk", 200))[0]]
        eventually(lambda: any(s.state == "prefill" for s in scheduler.status().sequences))
        ids += [submit(scheduler, asked("talk", 200))[0] for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests are waiting"):
            scheduler.submit(asked("talk"), Listener())
        for id in ids:
            scheduler.cancel(id)


def test_kv_memory_is_never_exceeded(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    limit = 64 * 12 * engine.info.kv_bytes_per_row
    seen: list[int] = []
    with running(engine, tokenizer, kv_bytes=limit, slots=8, queue=100) as scheduler:
        engine.before_decode = lambda: seen.append(scheduler.status().kv_bytes_reserved)
        requests = [asked("w " * (1 + 37 * n % 90), 4 + n) for n in range(20)]
        listeners = [submit(scheduler, request)[1] for request in requests]
        texts = [listener.wait().text for listener in listeners]
    assert len(texts) == 20
    assert all(texts)
    assert max(seen) <= limit


def test_what_never_fits_is_refused_and_the_rest_goes_on(
    engine: FakeEngine, tokenizer: ChatTokenizer
) -> None:
    with running(engine, tokenizer, kv_bytes=64 * 3 * engine.info.kv_bytes_per_row) as scheduler:
        _, long = submit(scheduler, asked("w " * 100))
        _, short = submit(scheduler, asked("w"))
        assert "KV memory" in str(long.wait().error)
        assert short.wait().text


def test_a_large_arena_gives_way(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    """One that a long prompt left must not lock a short prompt with a long reply out."""
    with running(engine, tokenizer, kv_bytes=64 * 8 * engine.info.kv_bytes_per_row, slots=2) as scheduler:
        assert submit(scheduler, asked("w " * 90, 1))[1].wait().text
        assert submit(scheduler, asked("w", 200))[1].wait().text


@pytest.mark.parametrize("state", ["queued", "prefill", "decode"])
def test_cancelling_ends_a_request_wherever_it_is(
    engine: FakeEngine, tokenizer: ChatTokenizer, state: str
) -> None:
    engine.step_seconds, engine.chunk_seconds = 0.005, 0.02 if state == "prefill" else 0
    with running(engine, tokenizer, slots=1, prefill_rows=16) as scheduler:
        blocker = submit(scheduler, asked("talk", 300)) if state == "queued" else None
        between = submit(scheduler, asked("talk", 300)) if state == "queued" else None
        id, listener = submit(scheduler, asked("long " * 60, 300))
        eventually(lambda: any(s.id == id and s.state == state for s in scheduler.status().sequences))
        scheduler.cancel(id)
        assert listener.wait().end.reason == "cancelled"
        scheduler.cancel(id)
        for other in (blocker, between):
            if other:
                scheduler.cancel(other[0])
                other[1].wait()
        assert submit(scheduler, asked("next", 3))[1].wait().end.reason == "length"


def test_time_limits(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    engine.step_seconds = 0.01
    with running(engine, tokenizer) as scheduler:
        listener = submit(scheduler, asked("talk", 300, timeout_seconds=0.2))[1].wait()
        assert listener.end.reason == "timeout"
        assert listener.text
        assert not scheduler.status().kv_bytes_held


def test_errors_hit_only_their_own_request(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    with running(engine, tokenizer) as scheduler:
        with pytest.raises(UsageError, match="no KV method"):
            scheduler.submit(asked("hi", policy=KvPolicy("magic")), Listener())
        with pytest.raises(UsageError, match="placeholders"):
            scheduler.submit(asked("hi", messages=conversation("hi", 2)), Listener())
        _, listener = submit(scheduler, asked("hi", messages=conversation("hi", 2), session_id="a"))
        assert isinstance(listener.wait().error, UsageError)
        assert submit(scheduler, asked("hi"))[1].wait().text


def test_an_engine_that_fails_takes_its_batch_and_nobody_else(
    engine: FakeEngine, tokenizer: ChatTokenizer
) -> None:
    def explode() -> None:
        engine.before_decode = lambda: None
        raise EngineError("the device is gone")

    with running(engine, tokenizer) as scheduler:
        engine.before_decode = explode
        _, first = submit(scheduler, asked("hi"))
        assert str(first.wait().error) == "the device is gone"
        assert submit(scheduler, asked("hi"))[1].wait().text


def test_a_listener_that_fails_is_cancelled(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("the client is gone")

    with running(engine, tokenizer) as scheduler:
        scheduler.submit(asked("hi", 300), broken)
        assert submit(scheduler, asked("hi"))[1].wait().text
        eventually(lambda: not scheduler.status().sequences)


def test_closing_answers_first_and_cancels_what_takes_too_long(
    engine: FakeEngine, tokenizer: ChatTokenizer
) -> None:
    engine.step_seconds = 0.005
    scheduler = Scheduler(engine, tokenizer, SchedulerLimits())  # type: ignore[arg-type]
    _, short = submit(scheduler, asked("hi", 3))
    _, long = submit(scheduler, asked("hi", 400))
    scheduler.close(0.3)
    assert short.end.reason == "length"
    assert long.end.reason == "cancelled"
    with pytest.raises(BusyError, match="shutting down"):
        scheduler.submit(asked("hi"), Listener())


def test_soak_of_random_requests_and_cancels(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    """A thousand requests from eight clients: all end, and no slot or session is left behind."""
    chance, lock = random.Random(0), threading.Lock()
    limit = 64 * 40 * engine.info.kv_bytes_per_row

    def client(number: int) -> str:
        with lock:
            tokens, words = chance.randint(1, 20), chance.randint(1, 40)
            session = chance.choice([None, "a", "b", "c"])
            cancel = chance.random() < 0.25
        while True:
            try:
                id, listener = submit(scheduler, asked("w " * words, tokens, session_id=session))
                break
            except BusyError:
                time.sleep(0.005)
        if cancel:
            scheduler.cancel(id)
        return listener.wait().end.reason

    with running(engine, tokenizer, slots=6, queue=16, kv_bytes=limit) as scheduler:
        with ThreadPoolExecutor(8) as clients:
            reasons = list(clients.map(client, range(1000)))
        status = scheduler.status()
    assert set(reasons) == {"length", "cancelled"}
    assert status.kv_bytes_held == 0
    assert status.kv_bytes_reserved <= limit
    assert status.parked_sessions <= 3


def test_bad_limits() -> None:
    with pytest.raises(UsageError, match="slots must be at least 1"):
        SchedulerLimits(slots=0)
