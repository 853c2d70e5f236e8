# SPDX-License-Identifier: Apache-2.0
"""A model that does the same to a screen that doesn't change is asked again, and then ended."""

import json
from pathlib import Path

import pytest
from agent_fakes import DeadRoom, FakeModel, Room
from conftest import ChatModel
from PIL import Image
from test_agent_loop import CLICK, run

from starkv.runtime.actions.types import Click, Point
from starkv.runtime.agent import Agent
from starkv.runtime.agents.asking import SessionAsk
from starkv.runtime.agents.history import prompt_of
from starkv.runtime.agents.loop import AgentLoop, LoopSettings
from starkv.runtime.agents.trace import Trace
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy

OTHER = "Action: click(start_box='(1,1)')"
END = "Action: finished()"


def settings(**changes: int) -> LoopSettings:
    parameters = SamplingParameters(seed=7)
    return LoopSettings("ui_tars_computer", "absolute", parameters=parameters, **changes)  # type: ignore[arg-type]


def test_it_is_asked_again_at_a_higher_temperature() -> None:
    model, room = FakeModel([CLICK, CLICK, CLICK, OTHER, END]), DeadRoom()
    outcome, steps = run(model, room, settings(repeats=2))
    assert room.performed == [Click(Point(20, 40))] * 2 + [Click(Point(2, 2))]
    assert [(p.temperature, p.seed) for p in model.parameters] == [(0, 7), (0, 7), (0, 7), (1, 8), (0, 7)]
    assert model.messages[2] == model.messages[3], "the same question"
    third = steps[2]
    assert (third.unchanged, third.retries, third.text, third.error) == (2, 1, OTHER, None)
    assert [(one.text, one.error) for one in third.rejected] == [
        (CLICK, "done 2 times on this same screen without any change")
    ]
    assert outcome.reason == "finished"


def test_it_ends_where_it_says_the_same_for_ever() -> None:
    model, room = FakeModel([CLICK]), DeadRoom()
    outcome, steps = run(model, room, settings(repeats=3, retries=2, steps=50))
    assert (outcome.reason, outcome.steps, outcome.success) == ("stuck", 4, None)
    assert "3 times on this same screen" in str(outcome.error)
    assert (len(room.performed), len(model.messages)) == (3, 3 + 3)
    assert (steps[-1].performed, steps[-1].unchanged, len(steps[-1].rejected)) == (0, 3, 3)


def test_what_it_says_last_decides_how_it_ends() -> None:
    replies = [CLICK, CLICK, "I wonder"]
    outcome, _ = run(FakeModel(replies), DeadRoom(), settings(repeats=1, retries=1))
    assert outcome.reason == "unreadable"
    outcome, _ = run(FakeModel([CLICK, "I wonder", CLICK]), DeadRoom(), settings(repeats=1, retries=1))
    assert outcome.reason == "stuck"


def test_other_actions_in_between_do_not_hide_it() -> None:
    outcome, steps = run(FakeModel([CLICK, OTHER] * 9), DeadRoom(), settings(repeats=2, retries=0))
    assert (outcome.reason, len(steps)) == ("stuck", 5)


def test_a_change_starts_the_count_anew() -> None:
    model = FakeModel([CLICK, CLICK, OTHER, CLICK, CLICK, END])
    room = DeadRoom(Click(Point(2, 2)))
    outcome, steps = run(model, room, settings(repeats=2, retries=0))
    assert (outcome.reason, len(room.performed)) == ("finished", 5)
    assert [step.unchanged for step in steps] == [0, 1, 2, 0, 1, 2]


def test_screens_that_change_may_be_clicked_for_ever() -> None:
    outcome, steps = run(FakeModel([CLICK]), Room(), settings(repeats=1))
    assert (outcome.reason, len(steps)) == ("steps", 15)


@pytest.mark.parametrize("text", ["Action: wait()", "Action: wait()\n\nwait()"])
def test_waiting_may_be_repeated(text: str) -> None:
    outcome, steps = run(FakeModel([text]), DeadRoom(), settings(repeats=1, steps=6))
    assert (outcome.reason, len(steps)) == ("steps", 6)


def test_it_can_be_switched_off() -> None:
    outcome, steps = run(FakeModel([CLICK]), DeadRoom(), settings(repeats=0))
    assert (outcome.reason, len(steps)) == ("steps", 15)


def test_the_trace_shows_it(tmp_path: Path) -> None:
    trace = Trace(tmp_path, {"goal": "Find it."})
    loop = AgentLoop(DeadRoom(), FakeModel([CLICK]), "Find it.", settings(repeats=2, retries=1), trace.add)
    trace.finish(loop.run())
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert lines[3]["unchanged"] == 2
    assert [one["error"] for one in lines[3]["rejected"]] == [
        "done 2 times on this same screen without any change"
    ] * 2
    assert lines[-1]["reason"] == "stuck"
    page = (tmp_path / "index.html").read_text()
    assert "unchanged since step 1" in page
    assert "attempt 2: done 2 times on this same screen" in page
    assert "stuck after 3 steps" in page


def test_a_question_asked_again_goes_on_from_where_the_first_did(babbling: ChatModel) -> None:
    """In stream mode the first answer must not be part of the history of the second."""
    agent = Agent.load(babbling.engine, threads=1)
    dialect = "ui_tars_grounding"
    screens = [Image.new("RGB", (56, 56), (shade, 0, 0)) for shade in (0, 90)]
    parameters = SamplingParameters(3)
    ask = SessionAsk(agent, KvPolicy(), dialect, "stream")
    first = prompt_of("click", [], screens[0], 5, dialect)
    ask(*first, parameters)
    session = ask._session
    assert session.state is not None
    once = session.state.tokens
    again = ask(*first, SamplingParameters(3, temperature=1.0, seed=3))
    assert session.reused_tokens == 0
    assert session.state.tokens == once
    grown: list[object] = [*first[0], {"role": "assistant", "content": again.text}]
    grown.append({"role": "user", "content": [{"type": "image"}]})
    for _ in range(2):
        ask(grown, screens, parameters)  # type: ignore[arg-type]
        assert session.reused_tokens >= once - 1, "it goes on from the first screenshot's rows"
