# SPDX-License-Identifier: Apache-2.0
"""The benchmark of stream mode's accuracy asks the same question in both modes."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.agent import Agent
from starkv.runtime.kv.policy import KvPolicy
from starkv.synthetic.samples import Sample
from starkv.synthetic.suite import trajectory_samples

if TYPE_CHECKING:
    from stream_asking import StreamAsker

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TOKENS = 24


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import stream_asking

    return stream_asking


@pytest.fixture(scope="module")
def agent(gui_tiny_engine: Path) -> Agent:
    return Agent.load(gui_tiny_engine, threads=1)


@pytest.fixture
def asker(asking: Any, agent: Agent) -> "StreamAsker":
    made: StreamAsker = asking.StreamAsker(agent, TOKENS)
    return made


@pytest.fixture(scope="module")
def questions() -> list[Sample]:
    """The first of two episodes, with three and with more screenshots."""
    return list(islice(trajectory_samples("validation", 0, 13), 0, 13, 6))


def test_without_eviction_all_ways_say_the_same(
    asking: Any, asker: "StreamAsker", questions: list[Sample]
) -> None:
    for question in questions:
        replies = [asker.ask(question, way, KvPolicy()) for way in ("prompt", *asking.STREAMS)]
        assert len({reply.text for reply in replies}) == 1
        assert {reply.kept for reply in replies} == {float(replies[0].full)}


def test_budgets_are_of_the_whole_prompt(asking: Any, asker: "StreamAsker", questions: list[Sample]) -> None:
    policy = KvPolicy(STAR_KV, Budget(0.3))
    for question in questions:
        replies = {way: asker.ask(question, way, policy) for way in ("prompt", *asking.STREAMS)}
        assert len({reply.full for reply in replies.values()}) == 1
        for way, reply in replies.items():
            # A step of the question alone can't fill layers up again that were cut before.
            least = 0.2 if way == "stream, asked apart" else 0.29
            assert least * reply.full < reply.kept <= 0.3 * reply.full + 1, way


def test_pieces_that_are_another_prompt_are_noticed(
    asking: Any, asker: "StreamAsker", questions: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = type(asker).pieces

    def swapped(self: "StreamAsker", sample: Sample) -> tuple[list[str], str]:
        frames, question = pieces(self, sample)
        return frames, question.replace("Click", "click") + " "

    question = replace(questions[0], question="Click 'Save'.")
    prompt = asker._prompt(question)
    monkeypatch.setattr(type(asker), "pieces", swapped)
    monkeypatch.setattr(type(asker), "_prompt", lambda *_: prompt)
    with pytest.raises(ValueError, match="another prompt"):
        asker.ask(question, "stream", KvPolicy())


def test_the_question_leaves_no_rows_behind_where_it_is_told_before(
    asker: "StreamAsker", questions: list[Sample]
) -> None:
    frames, question = asker.pieces(questions[0])
    prompt = asker._prompt(questions[0])
    images = asker._prepared(questions[0])
    plan = asker._plan(None, frames[0], images[:1], prompt)
    policy = KvPolicy(STAR_KV, Budget(0.3))
    state = asker._append(None, plan, question, images[0], prompt, policy)
    plain = asker._append(None, plan, "", asker._prepared(questions[0])[0], prompt, policy)
    assert state.tokens == plain.tokens == len(plan.ids)
    assert state.next_position == plain.next_position
    for meta in state.rows.row_meta:
        assert meta[:, 3].max() < len(plan.ids)
    kept = [tuple(meta[:, 3]) for meta in state.rows.row_meta]
    assert kept != [tuple(meta[:, 3]) for meta in plain.rows.row_meta], "the question has a say"
