# SPDX-License-Identifier: Apache-2.0
"""What the HTTP server does not take: each is answered with the field, the reason and the fix."""

import base64
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from served import Json, Server, data_uri, error_of, noise, picture, serving

from starkv.errors import UsageError
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import png_bytes
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.server.options import ServerOptions
from starkv.runtime.server.run import run_server


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


def test_images_have_limits(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    with serving(served_engine, served_tokenizer, most_images=3, most_image_pixels=40_000) as running:
        small, large = picture(data_uri(noise(0))), picture(data_uri(noise(0, 300, 200)))
        four = error_of(running.chat(messages=[{"role": "user", "content": [small] * 4}]), 400)
        assert four["code"] == "too_many_images"
        wide = error_of(running.chat(messages=[{"role": "user", "content": [large]}]), 400)
        assert "40,000" in wide["message"]
        assert running.chat(messages=[{"role": "user", "content": [small] * 3}]).status_code == 200


def test_local_files_come_from_the_media_folder_only(
    served_engine: FakeEngine, served_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    media, secret = tmp_path / "media", tmp_path / "secret.png"
    media.mkdir()
    noise(0).save(media / "a picture.png")
    noise(0).save(secret)
    (media / "link.png").symlink_to(secret)
    with serving(served_engine, served_tokenizer, media_path=media) as running:

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


def test_large_bodies_are_not_read(served_engine: FakeEngine, served_tokenizer: ChatTokenizer) -> None:
    with serving(served_engine, served_tokenizer, most_body_bytes=10_000) as running:
        error_of(running.chat(messages=[{"role": "user", "content": "w" * 20_000}]), 413)

        def endless() -> Iterator[bytes]:
            for _ in range(10_000):
                yield b"w" * 1000

        # Without a length nobody knows beforehand; reading stops where it is too much.
        with suppress(httpx.WriteError):  # the server may hang up in the middle
            error_of(running.http.post("/v1/chat/completions", content=endless()), 413)
        assert running.chat().status_code == 200


def test_bad_options(tmp_path: Path, served_engine: FakeEngine) -> None:
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
                scheduler,
                served_engine.manifest,
                served_engine.info,
                good,
                "127.0.0.1",
                taken.getsockname()[1],
                print,
            )
