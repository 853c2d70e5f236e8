# SPDX-License-Identifier: Apache-2.0
"""The HTTP server, asked by OpenAI's own client over a real socket; the engine is a fake that counts rows."""

import json
import logging
from typing import Any

import openai
import pytest
from conftest import ChatModel
from fake_engine import FakeEngine
from served import Json, Server, data_uri, error_of, noise, picture, serving

from starkv.runtime.agent import Agent
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.server.logs import JsonFormatter


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
    assert reply["timings"]["preprocess_ms"] > 0


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


def test_openai_exceptions(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    with serving(served_engine, served_tokenizer) as running:
        client, messages = running.client(), [{"role": "user", "content": "hi"}]
        create: Any = client.chat.completions.create
        with pytest.raises(openai.NotFoundError, match="not served here"):
            create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError, match="n must be 1"):
            create(model="tiny", messages=messages, n=3)
        assert [model.id for model in client.models.list()] == ["tiny"]


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


def test_keys(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    with serving(served_engine, served_tokenizer, api_key="sesame") as running:
        messages: Any = [{"role": "user", "content": "hi"}]
        with pytest.raises(openai.AuthenticationError, match="API key"):
            running.client("wrong").chat.completions.create(model="tiny", messages=messages)
        reply = running.client("sesame").chat.completions.create(
            model="tiny", messages=messages, max_tokens=2
        )
        assert reply.choices
        assert error_of(running.http.get("/slots"), 401)["type"] == "authentication_error"
        assert running.http.get("/health").status_code == 200


def test_keys_may_be_of_any_letters(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    with serving(served_engine, served_tokenizer, api_key="sésame") as running:
        headers = {b"authorization": "Bearer sésame".encode()}
        assert running.http.get("/slots", headers=headers).status_code == 200  # type: ignore[arg-type]
