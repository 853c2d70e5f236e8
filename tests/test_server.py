# SPDX-License-Identifier: Apache-2.0
"""The HTTP server, asked by OpenAI's own client over a real socket; the engine is a fake that counts rows."""

import asyncio
import base64
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import ChatModel
from fake_engine import FakeEngine
from openai import OpenAI
from PIL import Image

from starkv.errors import UsageError
from starkv.manifest import read_manifest
from starkv.runtime.agent import Agent
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import png_bytes
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.server.app import create_app
from starkv.runtime.server.guard import Guard
from starkv.runtime.server.logs import JsonFormatter
from starkv.runtime.server.options import ServerOptions
from starkv.runtime.server.run import DrainingServer, run_server
from starkv.runtime.serving.scheduler import Scheduler, SchedulerLimits

PATIENCE = 20.0
LIMITS = SchedulerLimits(slots=4, queue=8)
Json = dict[str, Any]


class Server:
    """A running server."""

    def __init__(self, url: str, scheduler: Scheduler, engine: Any) -> None:
        self.url, self.scheduler, self.engine = url, scheduler, engine
        self.http = httpx.Client(base_url=url, timeout=PATIENCE)

    def client(self, key: str = "any") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def idle(self) -> None:
        """Wait until no request is left."""
        eventually(lambda: not self.scheduler.status().sequences)


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


@contextmanager
def serving(
    engine: Any,
    tokenizer: ChatTokenizer,
    limits: SchedulerLimits = LIMITS,
    close_seconds: float = 5.0,
    **options: Any,
) -> Iterator[Server]:
    scheduler = Scheduler(engine, tokenizer, limits)
    chosen = ServerOptions(**{"model": "tiny", "policy": KvPolicy(), **options})
    app = create_app(scheduler, engine.manifest, engine.info, chosen)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = DrainingServer(app, scheduler, close_seconds)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    running = Server(f"http://127.0.0.1:{sock.getsockname()[1]}", scheduler, engine)
    try:
        yield running
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(PATIENCE)
        scheduler.close(0)


@pytest.fixture(scope="module")
def tokenizer(babbling: ChatModel) -> ChatTokenizer:
    return ChatTokenizer.from_directory(babbling.engine)


@pytest.fixture
def engine(babbling: ChatModel, tokenizer: ChatTokenizer) -> FakeEngine:
    manifest = read_manifest(babbling.engine).model_copy(update={"max_context": 8192})
    return FakeEngine(manifest, [tokenizer.encode(letter)[0] for letter in "abcdefghijklmnop"])


@pytest.fixture
def server(engine: FakeEngine, tokenizer: ChatTokenizer) -> Iterator[Server]:
    with serving(engine, tokenizer) as running:
        yield running


def noise(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def picture(url: str) -> Json:
    return {"type": "image_url", "image_url": {"url": url}}


def error_of(response: httpx.Response, status: int) -> Json:
    assert response.status_code == status, response.text
    error: Json = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_openai_client_gets_a_reply(server: Server) -> None:
    reply = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=6
    )
    assert len(reply.choices[0].message.content or "") == 6
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 6
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 6
    assert reply.model_extra is not None
    timings = reply.model_extra["timings"]
    assert timings["kv_tokens_full"] == timings["kv_tokens_kept"] == reply.usage.prompt_tokens
    assert timings["kv_bytes_held"] > 0


def test_streams_say_the_same(server: Server) -> None:
    asked: Json = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    whole = server.client().chat.completions.create(**asked)
    chunks = list(
        server.client().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 5
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_screens_are_clicked_in_pixels(reciting: ChatModel) -> None:
    """The whole way with a real engine: a model that says the same click on every screenshot."""
    agent = Agent.load(reciting.engine, threads=1)
    with serving(agent.engine, agent.tokenizer) as running:
        content = [picture(data_uri(noise(0, 392, 280))), {"type": "text", "text": "click the star"}]
        reply = running.chat(messages=[{"role": "user", "content": content}], max_tokens=20).json()
    expected = agent.act(noise(0, 392, 280), "click the star")
    assert reply["choices"][0]["message"]["content"] == expected.text
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["gui"]["model_xy"] == [56, 28]
    assert reply["gui"]["screen_xy"] == list(expected.to_json()["screen_xy"])  # type: ignore[call-overload]
    assert reply["gui"]["original_wh"] == [392, 280]


def test_ui_tars_messages(server: Server) -> None:
    """Content as text or list, images as URL objects or plain strings, assistant turns as text."""
    shown = [data_uri(noise(seed)) for seed in range(3)]
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "text", "text": "Open the file."}]},
        {"role": "user", "content": [picture(shown[0])]},
        {"role": "assistant", "content": "Thought: x\nAction: click(start_box='(1,2)')"},
        {"role": "user", "content": [{"type": "image_url", "image_url": shown[1]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Action: wait()"}]},
        {"role": "user", "content": [picture(shown[2].partition(",")[2])]},
    ]
    reply = server.chat(messages=messages, frequency_penalty=0, tools=[], user="me", unheard_of={"a": 1})
    assert reply.status_code == 200, reply.text
    assert [name for name, _ in server.engine.calls].count("encode") == 3


def test_sessions_reuse_their_cache(server: Server) -> None:
    messages: list[Json] = [{"role": "user", "content": [picture(data_uri(noise(1)))]}]
    first = server.chat(messages=messages, session_id="a").json()
    said = first["choices"][0]["message"]["content"]
    messages += [
        {"role": "assistant", "content": said},
        {"role": "user", "content": [picture(data_uri(noise(2)))]},
    ]
    second, fresh = (server.chat(messages=messages, session_id=name).json() for name in "ab")
    assert second["choices"] == fresh["choices"]
    assert second["usage"]["prompt_tokens"] == fresh["usage"]["prompt_tokens"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 35
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["timings"]["prompt_tokens"] < fresh["timings"]["prompt_tokens"]
    assert server.http.get("/slots").json()["parked_sessions"] == 2


def test_budgets_of_a_request(babbling: ChatModel) -> None:
    agent = Agent.load(babbling.engine, threads=1)
    message = {"role": "user", "content": [picture(data_uri(noise(1))), {"type": "text", "text": "click"}]}
    with serving(agent.engine, agent.tokenizer) as running:
        full, half, few = (
            running.chat(messages=[message], **fields).json()["timings"]
            for fields in ({}, {"kv_budget": 0.5}, {"kv_capacity": 20, "kv_method": "snapkv"})
        )
        wrong = error_of(running.chat(kv_method="magic"), 400)
    assert full["kv_tokens_kept"] == full["kv_tokens_full"]
    assert half["kv_tokens_kept"] == pytest.approx(half["kv_tokens_full"] / 2, abs=1)
    assert few["kv_tokens_kept"] == 20
    assert "no KV method 'magic'" in wrong["message"]


@pytest.mark.parametrize(
    ("fields", "status", "words", "parameter"),
    [
        ({"messages": []}, 400, "at least 1", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "'system'", "messages[0].role"),
        ({"model": "gpt-5"}, 404, "'gpt-5' is not served here", "model"),
        ({"n": 2}, 400, "n must be 1", "n"),
        ({"max_tokens": 100_000}, 400, "at most 2048", "max_tokens"),
        ({"max_completion_tokens": 100_000}, 400, "at most 2048", "max_completion_tokens"),
        ({"temperature": -1}, 400, "greater than or equal to 0", "temperature"),
        ({"kv_budget": 0}, 400, "greater than 0", "kv_budget"),
        ({"stop": [""]}, 400, "must not be empty", None),
        ({"messages": [{"role": "user", "content": "w " * 9000}]}, 400, "was built for 8192", None),
    ],
)
def test_wrong_fields_are_named(
    server: Server, fields: Json, status: int, words: str, parameter: str | None
) -> None:
    error = error_of(server.chat(**fields), status)
    assert words in error["message"]
    assert error["param"] == parameter
    assert server.chat().status_code == 200


def bomb() -> str:
    """A few bytes that claim 60,000 x 60,000 pixels."""
    png = bytearray(png_bytes(noise(0, 28, 28)))
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    return "data:image/png;base64," + base64.b64encode(bytes(png)).decode()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64,!!!", "no base64"),
        ("data:image/png,plain", "data:image/png;base64,"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
        ("https://example.com/a.png", "fetches nothing"),
        ("file:///etc/passwd", "reads no local files"),
        (bomb(), "image"),
        (data_uri(noise(0))[:-2000], "damaged"),
        ("", "empty"),
    ],
    ids=["base64", "no base64", "text", "https", "file", "bomb", "cut off", "empty"],
)
def test_wrong_images_are_named(server: Server, url: str, words: str) -> None:
    content = [{"type": "text", "text": "x"}, picture(url)]
    started = time.monotonic()
    error = error_of(server.chat(messages=[{"role": "user", "content": content}]), 400)
    assert error["message"].startswith("messages[0].content[1].image_url: ")
    assert words in error["message"]
    assert time.monotonic() - started < 5
    assert server.chat().status_code == 200


def test_images_have_limits(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    with serving(engine, tokenizer, most_images=3, most_image_pixels=40_000) as running:
        small, large = picture(data_uri(noise(0))), picture(data_uri(noise(0, 300, 200)))
        four = error_of(running.chat(messages=[{"role": "user", "content": [small] * 4}]), 400)
        assert four["code"] == "too_many_images"
        wide = error_of(running.chat(messages=[{"role": "user", "content": [large]}]), 400)
        assert "40,000" in wide["message"]
        assert running.chat(messages=[{"role": "user", "content": [small] * 3}]).status_code == 200


def test_local_files_come_from_the_media_folder_only(
    engine: FakeEngine, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    media, secret = tmp_path / "media", tmp_path / "secret.png"
    media.mkdir()
    noise(0).save(media / "a picture.png")
    noise(0).save(secret)
    (media / "link.png").symlink_to(secret)
    with serving(engine, tokenizer, media_path=media) as running:

        def ask(url: str) -> httpx.Response:
            return running.chat(messages=[{"role": "user", "content": [picture(url)]}])

        assert ask(f"file://{media}/a%20picture.png").status_code == 200
        for url in (
            f"file://{secret}",
            f"file://{media}/../secret.png",
            f"file://{media}/%2e%2e/secret.png",
            f"file://{media}/link.png",
            f"file://{media}/none.png",
            f"file://elsewhere{media}/a%20picture.png",
            "file:///etc/passwd",
            f"file://{media}/a%00.png",
        ):
            error = error_of(ask(url), 400)
            assert error["message"].endswith("there is no such file in the media folder"), url


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[]", b'"text"', b"", b'{"messages": "\xff"}'])
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    error_of(server.http.post("/v1/chat/completions", content=body), 400)
    assert server.chat().status_code == 200


def test_large_bodies_are_not_read(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    with serving(engine, tokenizer, most_body_bytes=10_000) as running:
        error_of(running.chat(messages=[{"role": "user", "content": "w" * 20_000}]), 413)

        def endless() -> Iterator[bytes]:
            for _ in range(10_000):
                yield b"w" * 1000

        # Without a length nobody knows beforehand; reading stops where it is too much.
        with suppress(httpx.WriteError):  # the server may hang up in the middle
            error_of(running.http.post("/v1/chat/completions", content=endless()), 413)
        assert running.chat().status_code == 200


def test_keys(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    with serving(engine, tokenizer, api_key="sesame") as running:
        messages: Any = [{"role": "user", "content": "hi"}]
        with pytest.raises(openai.AuthenticationError, match="API key"):
            running.client("wrong").chat.completions.create(model="tiny", messages=messages)
        reply = running.client("sesame").chat.completions.create(
            model="tiny", messages=messages, max_tokens=2
        )
        assert reply.choices
        assert error_of(running.http.get("/slots"), 401)["type"] == "authentication_error"
        assert running.http.get("/health").status_code == 200


def test_openai_exceptions(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    with serving(engine, tokenizer) as running:
        client, messages = running.client(), [{"role": "user", "content": "hi"}]
        create: Any = client.chat.completions.create
        with pytest.raises(openai.NotFoundError, match="not served here"):
            create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError, match="n must be 1"):
            create(model="tiny", messages=messages, n=3)
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_busy_servers_say_when_to_come_back(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    engine.step_seconds = 0.01
    limits = SchedulerLimits(slots=1, queue=1)
    with serving(engine, tokenizer, limits) as running, ThreadPoolExecutor(3) as others:

        def states() -> list[str]:
            return [sequence.state for sequence in running.scheduler.status().sequences]

        waiting = [others.submit(running.chat, max_tokens=300)]
        eventually(lambda: states() == ["decode"])
        # One more than the queue: it is read already and waits for the slot.
        waiting.append(others.submit(running.chat, max_tokens=2))
        eventually(lambda: states() == ["decode", "prefill"])
        waiting.append(others.submit(running.chat, max_tokens=2))
        eventually(lambda: len(running.scheduler.status().sequences) == 3)
        refused = running.chat()
        assert error_of(refused, 503)["code"] == "busy"
        assert refused.headers["retry-after"] == "1"
        assert [one.result().status_code for one in waiting] == [200] * 3


def test_replies_that_take_too_long(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    engine.step_seconds = 0.02
    with serving(engine, tokenizer, timeout_seconds=0.3) as running:
        assert error_of(running.chat(max_tokens=500), 504)["code"] == "timeout"
        stream: Any = running.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=500, stream=True
        )
        # Half a reply may be half an action: a client must not take it for a whole one.
        with pytest.raises(openai.APIError, match=r"longer than 0\.3 seconds"):
            list(stream)
        before = len(running.engine.calls)
        with pytest.raises(openai.InternalServerError):
            OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=3).chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=500
            )
        assert [name for name, _ in running.engine.calls[before:]].count("compress") == 1


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_are_forgotten(server: Server, stream: bool) -> None:
    server.engine.step_seconds = 0.01
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000, "stream": stream}
    if stream:
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/chat/completions", json=body, timeout=0.5)
    server.idle()
    assert server.scheduler.status().kv_bytes_held == 0


def test_clients_that_never_read_disturb_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1500, "stream": True}
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )
    deaf = []
    for _ in range(3):
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.sendall(head + body)
        deaf.append(sock)
    # Their replies are generated and wait in vain; others are answered meanwhile and after.
    assert all(server.chat().status_code == 200 for _ in range(5))
    server.idle()
    for sock in deaf:
        sock.close()
    assert server.chat().status_code == 200


def test_errors_in_the_middle_of_a_stream(server: Server) -> None:
    def explode() -> None:
        raise RuntimeError("a bug")

    server.engine.before_decode = explode
    with pytest.raises(openai.APIError, match="internal error: RuntimeError"):
        list(
            server.client().chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
            )
        )
    error = error_of(server.chat(), 500)
    assert "a bug" not in error["message"]
    server.engine.before_decode = lambda: None
    assert server.chat().status_code == 200


def test_figures_for_prometheus(server: Server) -> None:
    server.chat()
    server.chat(n=5)
    text = server.http.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['starkv_requests_total{status="200"}']) == 1
    assert float(figures['starkv_requests_total{status="400"}']) == 1
    assert float(figures['starkv_tokens_total{kind="generated"}']) == 4
    assert float(figures["starkv_reply_seconds_count"]) == 1
    assert float(figures['starkv_sequences{state="decode"}']) == 0
    assert float(figures["starkv_kv_reserved_bytes"]) > 0


def test_facts(server: Server) -> None:
    props = server.http.get("/props").json()
    assert props["engine"]["backend"] == "fake"
    assert props["kv"] == {"method": "full", "budget": 1.0, "capacity": None}
    assert server.http.get("/health").json() == {"status": "ok"}
    assert error_of(server.http.get("/nowhere"), 404)["type"] == "not_found_error"
    assert server.http.get("/v1/models/tiny").json()["id"] == "tiny"
    error_of(server.http.get("/v1/models/other"), 404)
    error = error_of(server.chat(model="m" * 100_000), 404)
    assert len(error["message"]) < 300
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert server.http.post("/chat/completions", json=body).status_code == 200
    assert error_of(server.http.get("/v1/chat/completions"), 405)


def test_logs_say_nothing_of_what_was_said(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "starkv.server"):
        said = server.chat(messages=[{"role": "user", "content": "my secret"}]).json()
        server.chat(model="secret model")
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name == "starkv.server"]
    assert {"reply", "refused"} <= {json.loads(line)["event"] for line in lines}
    assert not any("secret" in line for line in lines)
    assert not any(said["choices"][0]["message"]["content"] in line for line in lines)


def test_ending_answers_first(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    engine.step_seconds = 0.01
    with ThreadPoolExecutor(1) as others, serving(engine, tokenizer) as running:
        create: Any = running.client().chat.completions.create
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}
        reply = others.submit(create, **asked)
        eventually(lambda: bool(running.scheduler.status().sequences))
    assert reply.result().choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_ending_tells_those_that_take_too_long(
    engine: FakeEngine, tokenizer: ChatTokenizer, stream: bool
) -> None:
    engine.step_seconds = 0.02
    with ThreadPoolExecutor(1) as others, serving(engine, tokenizer, close_seconds=0.3) as running:
        client: Any = running.client().chat.completions

        def ask() -> None:
            reply = client.create(
                model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=1000, stream=stream
            )
            if stream:
                list(reply)

        asked = others.submit(ask)
        eventually(lambda: any(s.state == "decode" for s in running.scheduler.status().sequences))
        # Leaving the block ends the server.
    with pytest.raises(openai.APIError, match="shutting down"):
        asked.result()


def test_keys_may_be_of_any_letters(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    with serving(engine, tokenizer, api_key="sésame") as running:
        headers = {b"authorization": "Bearer sésame".encode()}
        assert running.http.get("/slots", headers=headers).status_code == 200  # type: ignore[arg-type]


def test_who_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets hold too much to fill one in a test: what sends is a function that never returns."""
    monkeypatch.setattr("starkv.runtime.server.guard.READ_SECONDS", 0.05)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def stuck(message: Any) -> None:
        await asyncio.Event().wait()

    async def receive() -> Any:
        return {}

    metrics: Any = None
    guard = Guard(app, None, metrics)
    scope = {"type": "http", "path": "/elsewhere", "headers": []}
    with pytest.raises(ConnectionError, match="unread"):
        asyncio.run(guard(scope, receive, stuck))


def test_a_thousand_requests_of_all_kinds(engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
    """Clients that leave, bodies that are broken, and good ones in between: nothing is left behind."""
    image = picture(data_uri(noise(0, 56, 56)))
    kinds: list[tuple[Mapping[str, Any], set[int]]] = [
        ({"max_tokens": 3}, {200, 503}),
        ({"max_tokens": 3, "stream": True}, {200, 503}),
        ({"max_tokens": 5, "session_id": "a"}, {200, 503}),
        ({"messages": [{"role": "user", "content": [image]}]}, {200, 503}),
        ({"messages": [{"role": "user", "content": [picture("data:image/png;base64,aGk=")]}]}, {400}),
        ({"messages": []}, {400}),
        ({"model": "other"}, {404}),
    ]
    with serving(engine, tokenizer, SchedulerLimits(slots=4, queue=16)) as running:

        def ask(number: int) -> bool:
            fields, statuses = kinds[number % len(kinds)]
            if number % 11 == 0:
                body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 500, "stream": True}
                with running.http.stream("POST", "/v1/chat/completions", json=body):
                    return True
            return running.chat(**fields).status_code in statuses

        with ThreadPoolExecutor(8) as clients:
            assert all(clients.map(ask, range(1000)))
        running.idle()
        status = running.scheduler.status()
        assert status.kv_bytes_held == 0
        assert status.parked_sessions <= 1
        assert running.chat().status_code == 200


def test_bad_options(tmp_path: Path, engine: FakeEngine) -> None:
    good = ServerOptions("tiny", KvPolicy())
    for changes, words in (
        ({"api_key": " "}, "API key is empty"),
        ({"media_path": tmp_path / "none"}, "is no folder"),
        ({"most_images": 0}, "most_images must be at least 1"),
        ({"timeout_seconds": 0.0}, "above 0 seconds"),
    ):
        with pytest.raises(UsageError, match=words):
            replace(good, **changes)  # type: ignore[arg-type]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        scheduler: Any = None
        with pytest.raises(UsageError, match="can't listen at"):
            run_server(
                scheduler, engine.manifest, engine.info, good, "127.0.0.1", taken.getsockname()[1], print
            )
