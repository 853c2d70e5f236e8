# SPDX-License-Identifier: Apache-2.0
"""What all requests together may hold: beyond it clients are told to come back, and later there is room."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from fake_engine import FakeEngine
from served import PATIENCE, Json, Server, data_uri, error_of, eventually, noise, picture, serving

from starkv.errors import UsageError
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.server.errors import ApiError
from starkv.runtime.server.in_flight import Held, InFlight
from starkv.runtime.server.options import ServerOptions

IMAGE_PIXELS = 200 * 150


def shown(*seeds: int) -> list[Json]:
    """One turn with screenshots."""
    return [{"role": "user", "content": [picture(data_uri(noise(seed))) for seed in seeds]}]


def busy(response: httpx.Response, words: str) -> None:
    error = error_of(response, 503)
    assert (error["type"], error["code"]) == ("server_error", "busy")
    assert words in error["message"]
    assert response.headers["retry-after"] == "1"


@contextmanager
def long_reply(server: Server, **fields: object) -> Iterator[None]:
    """A request that is being answered; given up at the end."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1500, "stream": True, **fields}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        yield


def in_progress(server: Server) -> Held:
    """What the server says it holds."""
    lines = server.http.get("/metrics").text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    names = ("requests", "body_bytes", "pixels")
    return Held(*(int(float(figures[f"starkv_{name}_in_progress"])) for name in names))


def partial_request(server: Server, length: int, sent: int) -> socket.socket:
    """A client that says its body has ``length`` bytes and sends ``sent`` of them."""
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=PATIENCE)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n"
    sock.sendall(head.encode() + b"w" * sent)
    return sock


def test_requests_in_progress(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    served_engine.step_seconds = 0.01
    with serving(served_engine, served_tokenizer, most_requests=1) as running:
        with long_reply(running):
            busy(running.chat(), "1 requests are in progress")
            assert running.http.get("/health").status_code == 200
            assert in_progress(running).requests == 1
        eventually(lambda: in_progress(running) == Held())
        assert running.chat().status_code == 200


def test_bodies_together(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    limits = {"most_body_bytes": 100_000, "most_total_body_bytes": 100_000}
    large = [{"role": "user", "content": "w" * 40_000}]
    with serving(served_engine, served_tokenizer, **limits) as running:
        # Who says much and sends nothing keeps nobody out.
        said = partial_request(running, 90_000, 0)
        assert running.chat(messages=large).status_code == 400, "too long for the engine, but read"
        sent = partial_request(running, 90_000, 80_000)
        eventually(lambda: in_progress(running).body_bytes == 80_000)
        busy(running.chat(messages=large), "80000 of the 100000 bytes")
        assert running.chat().status_code == 200
        for sock in (said, sent):
            sock.close()
        eventually(lambda: in_progress(running) == Held())
        assert running.chat(messages=large).status_code == 400


def test_bodies_without_a_length(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    limits = {"most_body_bytes": 100_000, "most_total_body_bytes": 100_000}
    body = json.dumps({"messages": [{"role": "user", "content": "w" * 30_000}]}).encode()
    with serving(served_engine, served_tokenizer, **limits) as running:
        sent = partial_request(running, 90_000, 80_000)
        eventually(lambda: in_progress(running).body_bytes == 80_000)
        pieces = (body[start : start + 5000] for start in range(0, len(body), 5000))
        busy(running.http.post("/v1/chat/completions", content=pieces), "bytes that they may take together")
        sent.close()
        eventually(lambda: in_progress(running) == Held())


def test_pixels_together(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    served_engine.step_seconds = 0.01
    most = 2 * IMAGE_PIXELS + 1000
    with serving(
        served_engine, served_tokenizer, most_image_pixels=40_000, most_total_pixels=most
    ) as running:
        never = error_of(running.chat(messages=shown(1, 2, 3)), 400)
        assert (never["code"], never["param"]) == ("too_many_pixels", "messages")
        assert "61,000 pixels" in never["message"]
        with long_reply(running, messages=shown(4, 5)):
            assert in_progress(running).pixels == 2 * IMAGE_PIXELS
            busy(running.chat(messages=shown(6)), "60,000 of the 61,000 pixels")
            assert running.chat().status_code == 200, "text needs none"
        eventually(lambda: in_progress(running) == Held())
        assert running.chat(messages=shown(6)).status_code == 200
        # What was seen before is not decoded again.
        with long_reply(running, messages=shown(4, 5)):
            assert in_progress(running).pixels == 0


def test_connections(
    served_engine: FakeEngine, served_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starkv.runtime.server.connections.HEAD_SECONDS", 1.0)
    with serving(served_engine, served_tokenizer, most_connections=2) as running:
        host, port = running.url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port)), timeout=PATIENCE) for _ in range(2)]
        refused = running.chat()
        busy(refused, "2 connections are open")
        assert refused.headers["connection"] == "close"
        # Those that never said anything are hung up on, and others get in.
        assert [sock.recv(1) for sock in silent] == [b"", b""]
        assert running.chat().status_code == 200
        for sock in silent:
            sock.close()


def test_twice_as_many_connections_get_no_answer(
    served_engine: FakeEngine, served_tokenizer: ChatTokenizer
) -> None:
    with serving(served_engine, served_tokenizer, most_connections=1) as running:
        host, port = running.url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port)), timeout=PATIENCE) for _ in range(2)]
        with pytest.raises(httpx.TransportError):
            running.chat()
        for sock in silent:
            sock.close()
        eventually(lambda: _answers(running))


def _answers(server: Server) -> bool:
    try:
        return server.chat().status_code == 200
    except httpx.TransportError:
        return False


def test_what_is_over_holds_nothing() -> None:
    whole = InFlight(ServerOptions("tiny", KvPolicy()))
    first, second = whole.enter(), whole.enter()
    first.take_body(10)
    second.take_pixels(20)
    assert whole.held == Held(2, 10, 20)
    first.close()
    assert whole.held == Held(1, 0, 20)
    # A thread may still be decoding images when its client has gone.
    with pytest.raises(ApiError, match="over"):
        first.take_pixels(1)
    second.close()
    second.close()
    assert whole.held == Held()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"most_requests": 0}, "most_requests must be at least 1"),
        ({"most_connections": 0}, "most_connections must be at least 1"),
        ({"most_total_body_bytes": 1}, "raise --max-body-total"),
        ({"most_total_pixels": 1}, "raise --max-pixels-total"),
    ],
)
def test_limits_that_make_no_sense(wrong: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ServerOptions("tiny", KvPolicy(), **wrong)  # type: ignore[arg-type]
