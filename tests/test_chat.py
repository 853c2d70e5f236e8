# SPDX-License-Identifier: Apache-2.0
"""A conversation through a pipe: replies on stdout, notes on stderr, nothing lost when a line is wrong."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from command import Command, Outcome
from conftest import ChatModel
from PIL import Image

from starkv.errors import EngineError
from starkv.runtime.preprocess.tokenizer import Message
from starkv.runtime.session import Session

REPLY = "Action: click(start_box='(56,28)')"
CLICK = "click: model_xy [56, 28], screen_xy [57.14, 30]"

Talk = Callable[..., Outcome]
Asked = list[tuple[Session, list[Message], int]]


@pytest.fixture
def talk(starkv: Command, reciting: ChatModel, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Chat with the model that always clicks: these lines come in, with these options."""

    def run(lines: Sequence[str], *options: object, engine: Path = reciting.engine) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return starkv("chat", "--engine", engine, *options)

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Session, messages and number of images of every question, as they come."""
    questions: Asked = []
    reply = Session.reply

    def remember(
        session: Session, messages: Sequence[Message], images: Sequence[object], *rest: object
    ) -> object:
        questions.append((session, list(messages), len(images)))
        return reply(session, messages, images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "reply", remember)
    return questions


def texts(messages: Sequence[Message]) -> list[object]:
    """Role and text of each message, with an ``*`` for each screenshot before it."""
    said = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = "".join("*" if part["type"] == "image" else part["text"] for part in content)
        said.append((message["role"], content))
    return said


def test_replies_go_to_stdout_and_notes_to_stderr(talk: Talk, screenshot: Path) -> None:
    outcome = talk(["click the red star", "", "again"], "--image", screenshot)
    assert (outcome.code, outcome.out) == (0, f"{REPLY}\n{CLICK}\n" * 2)
    notes = outcome.err.splitlines()
    assert [note.split(" tokens")[0] for note in notes] == ["4", "4"]
    assert "KV 52 of 52 rows" in notes[0]
    assert "tokens/s" in notes[0]


def test_the_whole_conversation_is_asked_each_time(talk: Talk, asked: Asked, screenshot: Path) -> None:
    talk(["one", f"/image {screenshot}", f"/image '{screenshot}'", "two", "three"])
    assert [images for *_, images in asked] == [0, 2, 2]
    assert texts(asked[-1][1]) == [
        ("user", "one"),
        ("assistant", REPLY),
        ("user", "**two"),
        ("assistant", REPLY),
        ("user", "three"),
    ]


def test_without_a_screenshot_there_is_nowhere_to_click(talk: Talk) -> None:
    assert talk(["hello"]).out == f"{REPLY}\n"


def test_the_newest_screenshot_is_clicked(talk: Talk, screenshot: Path) -> None:
    Image.new("RGB", (392, 280)).save("larger.png")
    outcome = talk(["one", "/image larger.png", "two"], "--image", screenshot)
    # The model sees the larger one as 252 x 168 pixels.
    assert outcome.out.splitlines()[1::2] == [CLICK, "click: model_xy [56, 28], screen_xy [87.11, 46.67]"]


def test_star_kv_remembers_the_trajectory_until_it_is_reset(
    talk: Talk, asked: Asked, screenshot: Path
) -> None:
    outcome = talk(
        ["one", f"/image {screenshot}", "two", "/reset", "three"], "--kv-budget", 0.5, "--image", screenshot
    )
    sessions = [session for session, *_ in asked]
    assert sessions[0] is sessions[1] is not sessions[2]
    steps = [session.kv_memory.progress.temporal_step for session in sessions[1:] if session.kv_memory]
    assert steps == [2, 1]
    assert texts(asked[-1][1]) == [("user", "three")]
    assert asked[-1][2] == 0
    assert "KV 24 of 48 rows" in outcome.err
    assert "the conversation is forgotten" in outcome.err


def test_quit_and_help(talk: Talk) -> None:
    outcome = talk(["/help", "/quit", "hello"])
    assert (outcome.code, outcome.out) == (0, "")
    assert "/image PATH" in outcome.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/image nowhere.png", "nowhere.png does not exist"),
        ("/image narrow.png", "too narrow"),
        ("/imagine", "unknown command '/imagine'"),
        ("star " * 600, "KV rows, but tiny was built for 512"),
        ("<|image_pad|>", "2 image placeholders for 1 images"),
    ],
)
def test_a_wrong_line_costs_nothing_but_itself(
    talk: Talk, asked: Asked, screenshot: Path, line: str, words: str
) -> None:
    Image.new("RGB", (900, 3)).save("narrow.png")
    outcome = talk(["one", line, "two"], "--image", screenshot)
    assert (outcome.code, outcome.out) == (0, f"{REPLY}\n{CLICK}\n" * 2)
    errors = [note for note in outcome.err.splitlines() if note.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert texts(asked[-1][1]) == [("user", "*one"), ("assistant", REPLY), ("user", "two")]


def test_attached_screenshots_can_be_taken_away(talk: Talk, asked: Asked, screenshot: Path) -> None:
    talk([f"/image {screenshot}", "/image", "one"])
    assert texts(asked[-1][1]) == [("user", "one")]


def test_an_engine_that_fails_leaves_the_memory_as_it_was(
    talk: Talk,
    asked: Asked,
    screenshot: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from starkv.runtime.engines.ort import OrtEngine

    decode, failing = OrtEngine.decode, iter((False, False, False, True))

    def sometimes(*arguments: object) -> object:
        if next(failing, False):
            raise EngineError("out of luck")
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(OrtEngine, "decode", sometimes)
    outcome = talk(["one", "two", "three"], "--image", screenshot, "--kv-budget", 0.5)
    assert "error: out of luck" in outcome.err
    assert texts(asked[-1][1]) == [("user", "*one"), ("assistant", REPLY), ("user", "three")]
    memory = asked[-1][0].kv_memory
    assert memory is not None
    assert memory.progress.temporal_step == 2


def interrupt(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Press Ctrl-C when a token comes out for the ``call``-th time."""
    from starkv.runtime.generation import StopScanner

    push, calls = StopScanner.push, iter(range(1, 1000))

    def pressed(scanner: StopScanner, text: str) -> str:
        if next(calls) == call:
            raise KeyboardInterrupt
        return push(scanner, text)

    monkeypatch.setattr(StopScanner, "push", pressed)


def test_ctrl_c_stops_one_reply(talk: Talk, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 2)
    outcome = talk(["one", "two"])
    assert (outcome.code, outcome.out) == (0, f"Action: click(start_box='(\n{REPLY}\n")
    assert outcome.err.splitlines()[0].endswith("; stopped")
    # What was said stays said.
    assert texts(asked[-1][1])[:2] == [("user", "one"), ("assistant", "Action: click(start_box='(")]


def test_ctrl_c_before_the_first_word_takes_the_message_back(
    talk: Talk,
    asked: Asked,
    screenshot: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt(monkeypatch, 1)
    outcome = talk(["one", "two"], "--image", screenshot)
    assert (outcome.code, outcome.out) == (0, f"{REPLY}\n{CLICK}\n")
    assert texts(asked[-1][1]) == [("user", "*two")]


def test_ctrl_c_at_the_prompt_ends_the_chat(
    starkv: Command, reciting: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, *_: object) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Keyboard())
    outcome = starkv("chat", "--engine", reciting.engine)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == "tiny; /help lists the commands\n> \n"


def test_options_reach_the_reply(talk: Talk) -> None:
    outcome = talk(["one"], "--max-new-tokens", 1)
    assert outcome.out == "Action: click(start_box='(\n"
    assert outcome.err.rstrip().endswith("cut at 1 tokens")
    assert talk(["one"], "--stop", "click").out == "Action: \n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--image", "nowhere.png"), "nowhere.png does not exist"),
        (("--kv-budget", 0), "share of the prompt in (0, 1]"),
        (("--top-p", 0), "top_p must lie in (0, 1]"),
    ],
)
def test_bad_options_end_it_before_it_begins(talk: Talk, options: tuple[object, ...], words: str) -> None:
    outcome = talk(["hello"], *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_bytes_that_are_no_text_are_replaced(
    starkv: Command,
    reciting: ChatModel,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"on\xffe\n"), "utf-8"))
    assert starkv("chat", "--engine", reciting.engine).out == f"{REPLY}\n"
    assert texts(asked[-1][1]) == [("user", "on\ufffde")]


def test_a_stream_reads_only_what_is_new(talk: Talk, asked: Asked, screenshot: Path) -> None:
    lines = ["click the red star", "again", "and again"]
    whole, part = talk(lines, "--image", screenshot), talk(lines, "--image", screenshot, "--stream")
    assert part.out == whole.out

    def read(outcome: Outcome) -> list[int]:
        return [int(note.split("; ")[1].split()[0]) for note in outcome.err.splitlines()]

    first, second, third = read(part)
    assert first == read(whole)[0]
    assert max(second, third) < first < read(whole)[1] < read(whole)[2]
    assert asked[-1][0].state is not None


def test_a_window_belongs_to_a_stream(talk: Talk) -> None:
    outcome = talk(["hello"], "--screenshots", 3)
    assert outcome.code == 2
    assert "--screenshots belongs to --stream" in outcome.err


def test_a_streams_newest_screenshot_can_be_compacted_at_once(
    talk: Talk, asked: Asked, screenshot: Path
) -> None:
    options = ("--image", screenshot, "--stream", "--kv-capacity", 24)
    for choice, waits in (((), True), (("--newest-compacted",), False)):
        assert talk(["click the red star"], *options, *choice).code == 0
        state = asked[-1][0].state
        assert state is not None
        assert (state.waiting is not None) is waits
