# SPDX-License-Identifier: Apache-2.0
"""Many clients at once, some of them slow, gone, or too late."""

import asyncio
import json
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from openai import OpenAI
from served import Server, data_uri, error_of, eventually, noise, picture, serving

from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.server.guard import Guard
from starkv.runtime.server.in_flight import InFlight
from starkv.runtime.server.options import ServerOptions
from starkv.runtime.serving.limits import SchedulerLimits


def test_busy_servers_say_when_to_come_back(
    served_engine: FakeEngine, served_tokenizer: ChatTokenizer
) -> None:
    served_engine.step_seconds = 0.01
    limits = SchedulerLimits(slots=1, queue=1)
    with serving(served_engine, served_tokenizer, limits) as running, ThreadPoolExecutor(3) as others:

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


def test_replies_that_take_too_long(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    served_engine.step_seconds = 0.02
    with serving(served_engine, served_tokenizer, timeout_seconds=0.3) as running:
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
    guard = Guard(app, None, metrics, InFlight(ServerOptions("tiny", KvPolicy())))
    scope = {"type": "http", "path": "/elsewhere", "headers": []}
    with pytest.raises(ConnectionError, match="unread"):
        asyncio.run(guard(scope, receive, stuck))


def test_ending_answers_first(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    served_engine.step_seconds = 0.01
    with ThreadPoolExecutor(1) as others, serving(served_engine, served_tokenizer) as running:
        create: Any = running.client().chat.completions.create
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}
        reply = others.submit(create, **asked)
        eventually(lambda: bool(running.scheduler.status().sequences))
    assert reply.result().choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_ending_tells_those_that_take_too_long(
    served_engine: FakeEngine, served_tokenizer: ChatTokenizer, stream: bool
) -> None:
    served_engine.step_seconds = 0.02
    with (
        ThreadPoolExecutor(1) as others,
        serving(served_engine, served_tokenizer, close_seconds=0.3) as running,
    ):
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


def test_a_thousand_requests_of_all_kinds(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
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
    with serving(served_engine, served_tokenizer, SchedulerLimits(slots=4, queue=16)) as running:

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
        figures = running.http.get("/metrics").text.splitlines()
        left = [line for line in figures if "_in_progress" in line and not line.startswith("#")]
        assert [line.rsplit(" ", 1)[1] for line in left] == ["0.0"] * 3
        assert running.chat().status_code == 200
