# SPDX-License-Identifier: Apache-2.0
"""The trace of a run: whole after every step, self-contained, and only text from strangers."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from agent_fakes import FakeModel, Room
from PIL import Image

from starkv.errors import UsageError
from starkv.runtime.agents.loop import AgentLoop, LoopSettings
from starkv.runtime.agents.steps import Step
from starkv.runtime.agents.trace import Trace
from starkv.runtime.agents.trace_page import bars

CLICK = "Thought: <script>alert(1)</script> & so on.\nAction: click(start_box='(50,25)')"
SETTINGS = LoopSettings("ui_tars_computer", "absolute", steps=3, retries=1)
HEADER = {"goal": "Find <b>it</b>.", "engine": "tiny", "url": None}


class Page(HTMLParser):
    """Tags and pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.pictures: list[Image.Image] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            kind, _, data = str(dict(attrs)["src"]).partition(";base64,")
            assert kind == "data:image/webp"
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
        elif tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


def page(folder: Path) -> tuple[str, Page]:
    text = (folder / "index.html").read_text(encoding="utf-8")
    return text, Page(text)


def traced(folder: Path, *replies: object) -> Trace:
    trace = Trace(folder, HEADER)
    loop = AgentLoop(Room(), FakeModel(replies), "x", SETTINGS, trace.add)  # type: ignore[arg-type]
    trace.finish(loop.run())
    return trace


def test_a_run_is_told_line_by_line(tmp_path: Path) -> None:
    traced(tmp_path / "run", CLICK, "what?", CLICK, "Action: finished(content='done')")
    run, first, second, third, outcome = lines(tmp_path / "run")
    assert run == {"type": "run", **HEADER}
    assert (first["type"], first["number"], first["screenshot"]) == ("step", 1, "step-001.png")
    assert first["actions"] == [{"type": "click", "model_xy": [50, 25], "screen_xy": [100, 50]}]
    assert first["timings"]["kv_bytes_held"] == 3 << 20  # type: ignore[index]
    assert first["timings"]["kv_tokens_kept"] == 20  # type: ignore[index]
    assert (second["retries"], second["rejected"][0]["text"]) == (1, "what?")  # type: ignore[index]
    assert third["actions"] == [{"type": "finished", "content": "done"}]
    assert (outcome["type"], outcome["reason"], outcome["message"]) == ("outcome", "finished", "done")
    with Image.open(tmp_path / "run" / "step-002.png") as image:
        assert (image.size, image.getpixel((0, 0))) == ((200, 100), (2, 0, 0))


def test_the_page_stands_alone_and_shows_strangers_words_as_text(tmp_path: Path) -> None:
    traced(tmp_path, CLICK)
    text, read = page(tmp_path)
    assert read.open == [], "every element is closed"
    assert not {"script", "link", "iframe", "b"} & set(read.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "https:" not in text
    assert "steps after 3 steps" in text
    assert read.tags.count("article") == 3
    assert read.tags.count("rect") == 6


def test_clicks_are_drawn_where_they_go(tmp_path: Path) -> None:
    traced(tmp_path, CLICK)
    _, read = page(tmp_path)
    pixels = np.asarray(read.pictures[0].convert("RGB")).astype(int)
    assert pixels.shape == (100, 200, 3)
    changed = np.argwhere(np.abs(pixels - (1, 0, 0)).max(axis=2) > 60)
    assert np.abs(changed.mean(axis=0) - (50, 100)).max() < 2


def test_a_run_that_was_killed_leaves_whole_files(tmp_path: Path) -> None:
    trace = Trace(tmp_path, HEADER)
    assert [line["type"] for line in lines(tmp_path)] == ["run"]
    step = Step(1)
    trace.add(step, Image.new("RGB", (20, 10)))
    trace.add(Step(2, error="interrupted"), None)
    assert [line["type"] for line in lines(tmp_path)] == ["run", "step", "step"]
    assert lines(tmp_path)[-1]["screenshot"] is None
    text, read = page(tmp_path)
    assert "No end is written down" in text
    assert read.open == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "step-001.png", "trace.jsonl"]


def test_an_interrupted_write_leaves_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(tmp_path, HEADER)
    trace.add(Step(1), None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        trace.add(Step(2), None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for place in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UsageError, match="no empty folder; choose another --out"):
            Trace(place, HEADER)
    with pytest.raises(UsageError, match="can't"):
        Trace(tmp_path / "mine" / "deeper", HEADER)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(tmp_path, HEADER)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UsageError, match=r"trace\.jsonl: No space left"):
        trace.add(Step(1), None)


def test_the_largest_value_fills_a_chart() -> None:
    assert [(bar.y, bar.height) for bar in bars([1.0, 4.0, 0.0], "s")] == [(75, 25), (0, 100), (100, 0)]
    assert bars([1.0, 4.0], "s")[1].label == "2: 4.00 s"
    assert [bar.height for bar in bars([0.0], "s")] == [0]
    assert bars([], "s") == []
