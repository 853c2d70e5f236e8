# SPDX-License-Identifier: Apache-2.0
"""A running server for tests, and what is sent to it."""

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from openai import OpenAI
from PIL import Image

from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import png_bytes
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.server.app import create_app
from starkv.runtime.server.options import ServerOptions
from starkv.runtime.server.run import DrainingServer
from starkv.runtime.serving.limits import SchedulerLimits
from starkv.runtime.serving.scheduler import Scheduler

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
    server = DrainingServer(app, scheduler, chosen.most_connections, close_seconds)
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
