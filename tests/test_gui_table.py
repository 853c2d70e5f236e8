# SPDX-License-Identifier: Apache-2.0
"""The table's questions are asked as a session would ask them; what acted and what the oracle keeps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
from asking import Asker
from components import components_acted, request_of
from gui_table_cases import LATE_PRIOR, MOST, ask, sample
from PIL import Image
from prefilled import FrameCache, clicked, prefill
from rows import ENGINE_ROWS, FAST_RAMP, NATIVE, OFFICIAL, REFERENCE_ROWS, chosen_rows

from starkv.export.cards import resolve_model
from starkv.methods.star_kv_plan import StarKVProgress
from starkv.runtime.agent import Agent
from starkv.runtime.engines.torch_reference import TorchReferenceEngine
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.preprocess.tokenizer import ChatTokenizer
from starkv.runtime.prompts.dialects import opening
from starkv.runtime.session import Session
from starkv.synthetic.samples import Sample


@pytest.fixture(scope="module")
def agent(gui_tiny_engine: Path) -> Agent:
    return Agent.load(gui_tiny_engine)


def test_a_batch_answers_as_one_by_one(agent: Agent) -> None:
    samples = [sample(0, frames=2)]
    together = ask(agent, samples, ENGINE_ROWS, [0.2, 0.6])
    alone = ask(agent, samples, ENGINE_ROWS, [0.2, 0.6], batch=1)
    assert together == alone
    texts = {cell.text for record in together for row in record.cells.values() for cell in row.values()}
    assert len(texts) > 2


def test_answers_are_those_of_a_session(agent: Agent) -> None:
    # The second prompt is shorter, so it gets the slots of the first; the third needs larger ones.
    samples = [sample(0, frames=2), sample(1), sample(2, frames=3)]
    rows = chosen_rows(ENGINE_ROWS, ["full", NATIVE, OFFICIAL, "snapkv"])
    records = ask(agent, samples, rows, [0.3])
    for row in rows:
        session = Session(agent.engine, agent.tokenizer, row.policy(0.3))
        for asked, record in zip(samples, records, strict=True):
            images = [Image.fromarray(frame) for frame in asked.frames]
            turns = opening(asked.question, len(images), "plain")
            text = "".join(session.reply(turns, images, SamplingParameters(MOST)))
            (cell,) = record.cells[row.name].values()
            assert cell.text == text
            assert cell.bytes == session.timings.kv_bytes_kept
            assert cell.rows == session.timings.kv_tokens_kept


def test_a_whole_budget_is_the_full_cache(agent: Agent) -> None:
    (record,) = ask(agent, [sample(0, frames=2)], ENGINE_ROWS, [1.0])
    full = record.cells["full"]["1"]
    assert set(record.cells) == {row.name for row in ENGINE_ROWS}
    for row in record.cells.values():
        assert (row["1"].text, row["1"].rows, row["1"].bytes) == (
            full.text,
            record.prompt_rows,
            record.full_bytes,
        )


def test_screenshots_of_successive_questions_are_encoded_once(agent: Agent) -> None:
    frames = FrameCache(agent, most=4)
    for number in range(3):
        prefill(agent, sample(number, frames=2), frames)
    assert frames.encoded == 4
    frames.see(sample(9).frames[0])
    frames.see(sample(3).frames[0])
    assert frames.encoded == 5
    # The one that was not used for the longest time is forgotten.
    frames.see(sample(0).frames[0])
    assert frames.encoded == 6


def test_components_follow_the_plan(agent: Agent) -> None:
    rows = (*chosen_rows(ENGINE_ROWS, [NATIVE, OFFICIAL, FAST_RAMP, "snapkv"]), LATE_PRIOR)
    asker = Asker(agent, rows, [0.3], MOST)

    def acted(asked: Sample) -> dict[str, set[str]]:
        record = asker.ask(asked)
        # Noise may or may not tell groups apart.
        return {
            row: set(by_budget["0.3"].acted) - {"uneven_prior"} for row, by_budget in record.cells.items()
        }

    single = acted(sample(0))
    assert single[OFFICIAL] == single[LATE_PRIOR.name] == {"boost"}
    assert single[FAST_RAMP] == {"boost", "prior"}
    assert {"boost", "entropy"} <= single[NATIVE] <= {"boost", "entropy", "prior"}
    assert single["snapkv"] == set()
    asker.forget()
    first, second = acted(sample(0, frames=2)), acted(sample(1, frames=2))
    # Official compares a pattern with itself at first; native has nothing to compare with yet.
    assert first[OFFICIAL] == second[OFFICIAL] == {"boost", "discount"}
    assert "discount" not in first[NATIVE]
    assert "discount" in second[NATIVE]
    assert second[LATE_PRIOR.name] == {"boost", "discount", "prior"}


def test_the_reference_runs_what_the_engine_cannot(gui_tiny_engine: Path) -> None:
    engine = TorchReferenceEngine.load(gui_tiny_engine, resolve_model("gui-tiny").folder)
    reference = Agent(engine, ChatTokenizer.from_directory(gui_tiny_engine))
    (record,) = ask(reference, [sample(0)], REFERENCE_ROWS, [0.3])
    assert set(record.cells) == {row.name for row in REFERENCE_ROWS}
    text = engine.manifest.text
    once, repeated = (record.cells[f"h2o{form} (reference)"]["0.3"] for form in ("", "_per_head"))
    assert repeated.rows == once.rows
    assert repeated.bytes == once.bytes * text.heads // text.kv_heads


@pytest.mark.parametrize(
    ("text", "convention", "expected"),
    [
        ("Action: click(start_box='(56,28)')", "absolute", (112.0, 56.0)),
        ("Action: click(start_box='(500,1000)')", "thousandths", (224.0, 448.0)),
        ("Thought: 'x'.\nAction: click(start_box='(2000,-3)')", "absolute", (4000.0, -6.0)),
        ("Action: wait()", "absolute", None),
        ("What?", "absolute", None),
    ],
)
def test_clicks_are_pixels_of_the_last_screenshot(
    agent: Agent, text: str, convention: str, expected: tuple[float, float] | None
) -> None:
    asked = prefill(agent, sample(0, height=448, width=448), FrameCache(agent))
    asked = replace(asked, seen=(replace(asked.seen[0], size=(224, 224)),))
    assert clicked(text, asked, "plain", convention) == expected


def test_the_oracle_keeps_what_the_answer_is_about(agent: Agent) -> None:
    asked = prefill(agent, sample(0, frames=2, height=224, width=112), FrameCache(agent))
    (start, end), (rows, columns) = asked.prompt.spans[1], asked.prompt.grids[1]
    assert rows != columns
    # The box from (10, 20) to (30, 40), in tokens.
    x = range(10 * columns // 112, -(-30 * columns // 112))
    y = range(20 * rows // 224, -(-40 * rows // 224))
    touched = {start + row * columns + column for row in y for column in x}
    length = asked.prompt.length
    for kept in (8 + len(touched) + 2, length // 2, length):
        found = oracle.oracle_rows(asked, kept)
        assert len(found) == kept
        assert (np.diff(found) > 0).all()
        assert touched | set(range(length - 8, length)) <= set(found.tolist())
    nearest = set(oracle.oracle_rows(asked, length // 2).tolist()) & set(range(start, end))
    assert touched < nearest


@pytest.mark.parametrize("name", [NATIVE, OFFICIAL, FAST_RAMP, LATE_PRIOR.name])
def test_components_that_acted_left_traces_in_the_scores(agent: Agent, name: str) -> None:
    engine, (row,) = agent.engine, [each for each in (*ENGINE_ROWS, LATE_PRIOR) if each.name == name]
    policy, memory, frames = row.policy(0.3), None, FrameCache(agent)
    for number, shown in enumerate((1, 2, 2)):
        asked = prefill(agent, sample(number, frames=shown), frames)
        progress = memory.progress if memory else StarKVProgress()
        request = request_of(policy, asked.prompt, progress, engine.manifest.observation_window)
        pool = engine.new_pool(1, engine.most_kept_rows(asked.prompt.length, policy))
        done = engine.compress(asked.arena, pool, pool.acquire(), asked.prompt, policy, memory)
        memory = done.memory
        acted = components_acted(request, pool.kv.lengths[:, 0].tolist(), done.stages)
        changed = np.abs(np.diff(done.stages, axis=1)).max(axis=(0, 2)) > 1e-6
        for component, differs in zip(("boost", "uneven_prior", "discount"), changed, strict=True):
            assert (component in acted) == differs, (component, number)


def test_a_prior_that_weighs_all_groups_alike_is_told_from_one_that_does_not(agent: Agent) -> None:
    asked = prefill(agent, sample(0), FrameCache(agent))
    policy = LATE_PRIOR.policy(0.3)
    once = StarKVProgress(profile_step=1, mi_known=True)
    request = request_of(policy, asked.prompt, once, agent.engine.manifest.observation_window)
    assert request is not None
    stages = np.random.default_rng(0).random((2, 4, asked.prompt.length), np.float32)
    stages[:, 2] = stages[:, 1] * np.float32(1 + 1e-7)
    rows = [request.window + request.limits.mean] * 2
    assert components_acted(request, rows, stages) == ("prior", "boost")
    stages[1, 2, 5] *= 1.01
    assert components_acted(request, rows, stages) == ("prior", "uneven_prior", "boost")
