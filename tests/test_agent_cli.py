# SPDX-License-Identifier: Apache-2.0
"""``starkv agent`` with a model that always says the same, and the example of the documentation."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Command, Outcome
from conftest import ChatModel

from starkv.runtime.agents.environment import Environment, EnvironmentOptions, open_environment
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.session import Session

DOCUMENT = Path(__file__).parent.parent / "docs" / "agent.md"
REPLY = "Action: click(start_box='(56,28)')"
SHORT = ("--max-new-tokens", 8)

Work = Callable[..., Outcome]


@pytest.fixture
def work(starkv: Command, reciting: ChatModel) -> Work:
    """Let the model that always clicks the same place act."""
    return lambda *options: starkv("agent", "--engine", reciting.engine, *SHORT, *options)


def example(number: int) -> str:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[number]


@pytest.fixture
def sign(starkv: Command, monkeypatch: pytest.MonkeyPatch) -> str:
    """The documentation's environment, as a module in the working folder that no other test knows."""
    Path("mine.py").write_text(example(0))
    monkeypatch.setattr("sys.path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return "mine:Sign"


def test_the_documented_environment_works(work: Work, sign: str) -> None:
    done = work("--environment", sign, "--goal", "Read.", "--kv-budget", 0.5, "--out", "run", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["success"], result["reason"], result["steps"]) == (True, "done", 2)
    assert (result["goal"], result["trace"]) == ("Read.", "run")
    assert len(re.findall(r"^step \d: click \[\d+", done.err, re.MULTILINE)) == 2
    run, first, second, outcome = map(json.loads, Path("run/trace.jsonl").read_text().splitlines())
    assert (run["kv_method"], run["kv_budget"]) == ("star_kv", 0.5)
    assert first["text"] == second["text"] == REPLY
    # The model sees the 280 x 196 pixels as 252 x 168.
    assert first["actions"] == [{"type": "click", "model_xy": [56, 28], "screen_xy": [62.22, 32.67]}]
    assert 0 < second["timings"]["kv_tokens_kept"] < second["timings"]["kv_tokens_full"]
    assert second["timings"]["image_tokens"] == 2 * first["timings"]["image_tokens"]
    assert outcome["success"] is True
    assert Path("run/index.html").read_text().count("<article") == 2


def test_one_session_asks_all_along(work: Work, sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, reply = [], Session.reply

    def remember(session: Session, *rest: object) -> object:
        sessions.append(session)
        return reply(session, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "reply", remember)
    work("--environment", sign, "--goal", "Read.", "--kv-budget", 0.5)
    assert len(sessions) == 2
    assert sessions[0] is sessions[1]
    assert sessions[0].kv_memory
    assert sessions[0].kv_memory.progress.temporal_step == 2


def test_a_stream_reads_only_the_new_screenshot(work: Work, sign: str) -> None:
    options = ("--environment", sign, "--goal", "Read.", "--dialect", "ui_tars_grounding", "--json")

    def prompts(*more: object) -> list[int]:
        done = work(*options, *more, "--out", f"run{len(more)}")
        assert done.code == 0, done.err
        lines = Path(f"run{len(more)}/trace.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        return [step["timings"]["prompt_tokens"] for step in steps if "timings" in step]

    (first, second), (same, new) = prompts(), prompts("--stream")
    assert first == same
    assert new < second / 2
    assert second > first


def test_streams_need_prompts_that_grow(work: Work, sign: str) -> None:
    done = work("--environment", sign, "--goal", "Read.", "--stream")
    assert done.code == 2
    assert "--dialect ui_tars_computer" in done.err


def test_the_desktop_judges(work: Work) -> None:
    done = work("--seed", 3, "--steps", 2)
    assert (done.code, done.out.split(" after")[0]) == (1, "not reached: steps")
    assert done.err.startswith("goal: Do: ")


def test_a_reply_that_is_no_action_does_not_count_for_star_kv(
    starkv: Command, babbling: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories, reply = [], Session.reply

    def remember(session: Session, *rest: object) -> object:
        memories.append(session.kv_memory)
        return reply(session, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "reply", remember)
    asked = ("--engine", babbling.engine, "--max-new-tokens", 4, "--kv-budget", 0.5, "--retries", 1, "--json")
    done = starkv("agent", *asked)
    assert (done.code, json.loads(done.out)["reason"]) == (1, "unreadable")
    assert memories == [None, None]
    assert "asked 2 times" in done.err


def test_a_prompt_that_does_not_fit_ends_the_run_with_its_reason(work: Work, sign: str) -> None:
    done = work("--environment", sign, "--goal", "star " * 600, "--json", "--out", "run")
    assert (done.code, json.loads(done.out)["reason"]) == (2, "error")
    assert "KV rows, but tiny was built for 512" in done.err
    assert json.loads(Path("run/trace.jsonl").read_text().splitlines()[-1])["type"] == "outcome"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--goal", "x"), "leave --goal out"),
        (("--environment", "browser"), "--url https://"),
        (("--environment", "moon"), "unknown environment 'moon'; known: desktop, browser"),
        (("--environment", "moon:Base"), "there is no module moon"),
        (("--environment", "json:Base"), "json has no class Base"),
        (("--environment", "builtins:str", "--goal", "x"), "lacks screenshot, perform"),
        (("--minutes", 0), "--minutes must be more than 0"),
        (("--kv-budget", 0), "share of the prompt in (0, 1]"),
        (("--dialect", "latin"), "unknown prompt dialect"),
        (("--out", "."), "choose another --out"),
    ],
)
def test_bad_options_are_refused_before_an_engine_is_opened(
    starkv: Command, options: tuple[object, ...], words: str
) -> None:
    Path("something").write_text("")
    done = starkv("agent", "--engine", "no/such/engine", *options)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert words in done.err


def test_an_environment_without_a_goal_needs_one(starkv: Command, sign: str) -> None:
    done = starkv("agent", "--engine", "no/such/engine", "--environment", sign)
    assert done.code == 2
    assert "say what is to be done with --goal" in done.err


def test_environments_are_closed_whatever_happens(
    starkv: Command, sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Environment] = []
    monkeypatch.setattr(Environment, "close", lambda environment: closed.append(environment))
    starkv("agent", "--engine", "no/such/engine", "--environment", sign, "--goal", "x")
    assert len(closed) == 1


def test_the_documented_python_runs(reciting: ChatModel) -> None:
    code = example(1).replace("engines/gui-tiny-ort-int8", str(reciting.engine))
    code = code.replace("manifest.coordinates)", "manifest.coordinates, steps=1, parameters=SHORT)")
    names: dict[str, object] = {"SHORT": SamplingParameters(8)}
    exec(code, names)
    assert names["outcome"].steps == 1  # type: ignore[attr-defined]


def test_a_class_can_be_named_by_its_module() -> None:
    named, full = "desktop", "starkv.runtime.agents.desktop:DesktopEnvironment"
    goals = [open_environment(name, EnvironmentOptions(seed=1)).goal for name in (named, full)]
    assert goals[0] == goals[1] is not None
