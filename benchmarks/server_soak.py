# SPDX-License-Identifier: Apache-2.0
"""A thousand requests of well-behaved, rude and broken clients at once against a real `starkv serve`.

    python benchmarks/server_soak.py --engine gui-tiny --out server-soak.json

Half of the clients ask as they should, with a screenshot, some in sessions. The others go away in the middle
of a reply, read it a byte at a time, or send bodies that are cut off, no JSON, or full of what is no image.
In between a canary asks the same question again and again: its answer must never change. At the end nothing
may be left in a slot, and the server's memory must have stopped growing.
"""

import argparse
import base64
import contextlib
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from common import report
from PIL import Image

from starkv.runtime.preprocess.image import png_bytes
from starkv.synthetic.suite import click_samples

PATIENCE = 120.0
SCREENS = 6
Json = dict[str, Any]


class Crowd:
    """Clients of every kind."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.host = url, httpx.URL(url)
        self.chance, self.lock = random.Random(seed), threading.Lock()
        samples = list(click_samples("test", 0, SCREENS))
        self.screens = [
            "data:image/png;base64," + base64.b64encode(png_bytes(Image.fromarray(sample.frames[0]))).decode()
            for sample in samples
        ]
        self.questions = [sample.question for sample in samples]
        self.outcomes: Counter[str] = Counter()
        self.kinds: dict[str, Callable[[httpx.Client], str]] = {
            "asks": self.ask,
            "asks in a session": self.ask_in_session,
            "streams": self.stream,
            "goes away": self.go_away,
            "reads slowly": self.read_slowly,
            "sends no JSON": self.send_no_json,
            "sends no image": self.send_no_image,
            "cuts its body off": self.cut_off,
        }

    def draw(self, number: int) -> int:
        """A random number below ``number``."""
        with self.lock:
            return self.chance.randrange(number)

    def body(self, **fields: Any) -> Json:
        """A question about a screenshot."""
        number = self.draw(SCREENS)
        parts = [
            {"type": "image_url", "image_url": {"url": self.screens[number]}},
            {"type": "text", "text": self.questions[number]},
        ]
        return {"messages": [{"role": "user", "content": parts}], "max_tokens": 1 + self.draw(16), **fields}

    def one(self, number: int) -> None:
        """One client's request; whatever comes of it is counted."""
        names = list(self.kinds)
        # The first three kinds are the good ones: half of all.
        name = names[self.draw(3)] if number % 2 else names[3 + self.draw(len(names) - 3)]
        with httpx.Client(base_url=self.url, timeout=PATIENCE) as http:
            try:
                outcome = self.kinds[name](http)
            except httpx.HTTPError as error:
                outcome = type(error).__name__
        with self.lock:
            self.outcomes[f"{name}: {outcome}"] += 1

    def post(self, http: httpx.Client, body: Json) -> str:
        response = http.post("/v1/chat/completions", json=body)
        return str(response.status_code)

    def ask(self, http: httpx.Client) -> str:
        return self.post(http, self.body())

    def ask_in_session(self, http: httpx.Client) -> str:
        return self.post(http, self.body(session_id=f"session-{self.draw(5)}", kv_budget=0.4))

    def stream(self, http: httpx.Client) -> str:
        with http.stream("POST", "/v1/chat/completions", json=self.body(stream=True)) as response:
            last = [line for line in response.iter_lines() if line][-1:]
        return f"{response.status_code} {'whole' if last == ['data: [DONE]'] else last}"

    def go_away(self, http: httpx.Client) -> str:
        body = self.body(stream=True, max_tokens=64)
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_bytes(), b"")
        return str(response.status_code)

    def read_slowly(self, http: httpx.Client) -> str:
        with http.stream("POST", "/v1/chat/completions", json=self.body(stream=True)) as response:
            for count, _ in enumerate(response.iter_bytes(1)):
                if count < 100:
                    time.sleep(0.01)
        return str(response.status_code)

    def send_no_json(self, http: httpx.Client) -> str:
        content = [b"{", b"\xff\xfe\x00", b'{"messages": 5}', b"[]", b'{"messages": []}'][self.draw(5)]
        return str(http.post("/v1/chat/completions", content=content).status_code)

    def send_no_image(self, http: httpx.Client) -> str:
        urls = ["data:image/png;base64,AAAA", "file:///etc/passwd", "http://x/y.png", self.screens[0][:2000]]
        picture = {"type": "image_url", "image_url": {"url": urls[self.draw(len(urls))]}}
        return self.post(http, {"messages": [{"role": "user", "content": [picture]}]})

    def cut_off(self, http: httpx.Client) -> str:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection((self.host.host, self.host.port or 80), PATIENCE) as raw:
            raw.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + b'{"messages": [')
        return "left"


def resident_mib(process: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="gui-tiny")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16, help="at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "starkv.cli", "serve", "--engine", args.engine, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://\S+(?=/v1)", line):
            break
    else:
        sys.exit("the server did not start")
    # Somebody must read what it logs, or it waits.
    threading.Thread(target=lambda: [None for _ in server.stderr or ()], daemon=True).start()
    try:
        figures = soak(found[0], server.pid, args.requests, args.clients, args.seed)
        figures["crashed"] = server.poll() is not None
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
    outcomes = sorted(figures["outcomes"].items())
    table = [
        ("what a client did: what came of it", "times"),
        *((name, str(times)) for name, times in outcomes),
    ]
    settings = {"engine": args.engine, "requests": args.requests, "clients": args.clients, "seed": args.seed}
    report(table, {"benchmark": "server_soak", **settings, **figures}, args.out)
    print(
        f"canaries wrong: {figures['canaries_wrong']}; left in slots: {len(figures['left_in_slots'])}; "
        f"crashed: {figures['crashed']}; MiB: {' '.join(f'{value:.0f}' for value in figures['resident_mib'])}"
    )
    bad = figures["crashed"] or figures["canaries_wrong"] or figures["left_in_slots"]
    return int(bool(bad))


def soak(url: str, process: int, requests: int, clients: int, seed: int) -> Json:
    """Send everything; returns what came of it."""
    crowd = Crowd(url, seed)
    with httpx.Client(base_url=url, timeout=PATIENCE) as http:

        def canary() -> str:
            body = {**crowd.body(), "max_tokens": 12, "messages": fixed}
            answer = http.post("/v1/chat/completions", json=body).json()
            return str(answer["choices"][0]["message"]["content"])

        fixed = crowd.body()["messages"]
        expected, wrong, memory = canary(), 0, [resident_mib(process)]
        tenth = max(1, requests // 10)
        for start in range(0, requests, tenth):
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(crowd.one, range(start, min(start + tenth, requests))))
            wrong += canary() != expected
            memory.append(resident_mib(process))
            print(f"{start + tenth} requests, {memory[-1]:.0f} MiB", file=sys.stderr)
        time.sleep(2.0)
        slots = http.get("/slots").json()
    return {
        "outcomes": dict(crowd.outcomes),
        "canaries_wrong": wrong,
        "left_in_slots": slots["sequences"],
        "resident_mib": memory,
        "slots": slots,
    }


if __name__ == "__main__":
    sys.exit(main())
