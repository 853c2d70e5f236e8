# SPDX-License-Identifier: Apache-2.0
"""``starkv eval --suite synthetic``: drawn clicks and trajectories, without any data."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from command import Command, Outcome
from conftest import ChatModel
from drawn_suite import EPISODE, FRAMES, use_drawn_suite

from starkv.evaluation.answers import Answer, Place, PlacedAction
from starkv.evaluation.boxes import Box
from starkv.evaluation.graders.point import click_in_box
from starkv.evaluation.prompts import question_of
from starkv.evaluation.suites.synthetic import load, parse_task
from starkv.manifest import read_manifest
from starkv.runtime.actions.coordinates import Size
from starkv.runtime.actions.types import Click, Hover, Point
from starkv.runtime.preprocess.image import load_image
from starkv.runtime.session import Session

Evaluate = Callable[..., Outcome]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    use_drawn_suite(monkeypatch)


@pytest.fixture
def evaluate(starkv: Command, reciting: ChatModel, drawn: None) -> Evaluate:
    """With the engine that clicks on (56, 28) whatever it sees."""
    return partial(starkv, "eval", "--suite", "synthetic", "--engine", reciting.engine, "--max-new-tokens", 8)


def test_the_embedded_model_hits_drawn_screens(starkv: Command, drawn: None) -> None:
    arguments = ("eval", "--suite", "synthetic", "--task", "click", "--n", 6, "--seed", 1)
    ran = starkv(*arguments, "--engine", "gui-tiny", "--json", "--out", "run")
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out)
    assert summary["accuracy"] >= 5 / 6
    assert (summary["suite"], summary["samples"], summary["rule"]) == ("synthetic", 6, "click-in-box")
    assert [metric["name"] for metric in summary["metrics"]] == ["all samples", "task icon", "task word"]
    assert [metric["count"] for metric in summary["metrics"]] == [6, 3, 3]
    assert all(metric["low"] < metric["value"] <= metric["high"] + 1e-9 for metric in summary["metrics"])
    assert summary["metrics"][0]["distance"] < 20
    assert summary["settings"]["data"].startswith("click, test, seed 1, ")
    records = [json.loads(line) for line in Path("run/records.jsonl").read_text().splitlines()]
    assert len({record["group"] for record in records}) == 6
    far = [record["distance"] for record in records]
    assert summary["metrics"][0]["distance"] == pytest.approx(sum(far) / len(far))


def test_the_table_has_rows_by_task_with_interval_number_and_distance(evaluate: Evaluate) -> None:
    ran = evaluate("--n", 4, "--out", "run")
    assert ran.code == 0, ran.err
    for words in (
        "all samples",
        "task icon",
        "task word",
        "mean distance, px",
        "95 % interval",
        "click-in-box",
    ):
        assert words in ran.out
    assert "synthetic" in ran.err  # the bar
    header, _, first, *_ = Path("run/report.md").read_text().split("\n\n")[2].splitlines()
    assert header.endswith("| mean distance, px |")
    assert "| all samples | click-in-box | " in first


def test_a_trajectory_is_one_turn_and_one_session(evaluate: Evaluate, reciting: ChatModel) -> None:
    (*_, sample) = load("trajectory", "test", 0, 2).samples
    question = question_of(sample, "plain", read_manifest(reciting.engine))
    (turn,) = question.messages
    assert [part["type"] for part in turn["content"]] == ["image"] * FRAMES + ["text"]
    shown = [load_image(image).tobytes() for image in (*sample.earlier, sample.image)]
    assert [image.tobytes() for image in question.images] == shown
    arguments = ("--task", "trajectory", "--n", 4, "--kv-budget", 0.5, "--json", "--out", "run")
    whole = evaluate(*arguments)
    assert whole.code == 0, whole.err
    path = Path("run/records.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["timings"]["image_tokens"] > 0 for line in lines] == [True] * 4
    # Interrupted in the second episode: all of it is asked again, because its memory is gone.
    path.write_text("".join(lines[: EPISODE + 1]))
    resumed = evaluate(*arguments)
    assert "2 of 4 samples are answered" in resumed.err
    assert json.loads(resumed.out)["metrics"] == json.loads(whole.out)["metrics"]


@pytest.mark.parametrize(("task", "sessions"), [("click", 4), ("trajectory", 2)])
def test_compression_remembers_trajectories_only(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, task: str, sessions: int
) -> None:
    asked: list[Session] = []
    reply = Session.reply

    def counted(self: Session, *given: object) -> object:
        asked.append(self)
        return reply(self, *given)

    monkeypatch.setattr(Session, "reply", counted)
    assert evaluate("--task", task, "--n", 4, "--json").code == 0
    assert len(asked) == 4
    assert len({id(session) for session in asked}) == sessions


def test_a_run_goes_on_with_more_samples_but_not_with_other_ones(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("--n", 2, "--out", "run").code == 0
    more = evaluate("--n", 3, "--out", "run")
    assert "2 of 3 samples are answered" in more.err
    for options in (("--seed", 1), ("--task", "trajectory"), ("--split", "validation")):
        refused = evaluate("--n", 2, "--out", "run", *options)
        assert refused.code == 2
        assert "holds another run: data is " in refused.err
    # The same names, other pictures: a generator that has changed.
    from drawn_suite import click_samples

    monkeypatch.setattr(
        "starkv.synthetic.suite.click_samples",
        lambda split, seed, count: (
            type(sample)(**{**vars(sample), "frames": (255 - sample.frames[0],)})
            for sample in click_samples(split, seed, count)
        ),
    )
    assert "holds another run: data is " in evaluate("--n", 2, "--out", "run").err


BAD = [
    (("--data", "folder"), "--suite synthetic draws its samples; leave --data out"),
    (("--limit", 3), "takes the number of samples as --n; leave --limit out"),
    (("--task", "drag"), "unknown task 'drag'; known: click, trajectory"),
    (("--split", "dev"), "unknown split 'dev'; known: train, validation, test"),
    (("--kv-budget", 2), "a KV budget is"),
]
FOREIGN = [
    (("--data", "folder", "--n", 3), "--n is for --suite synthetic; leave it out of screenspot-v2"),
    (("--data", "folder", "--seed", 0), "--seed is for --suite synthetic"),
    (("--data", "folder", "--task", "click"), "--task is for --suite synthetic"),
    (("--data", "folder", "--split", "test"), "--split is for --suite synthetic"),
    ((), "--suite screenspot-v2 needs --data: the folder of the data set"),
]


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [("synthetic", *bad) for bad in BAD] + [("screenspot-v2", *bad) for bad in FOREIGN],
)
def test_bad_options_are_one_line(
    evaluate: Evaluate, suite: str, options: tuple[object, ...], message: str
) -> None:
    ran = evaluate("--suite", suite, *options)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert message in ran.err


@pytest.mark.parametrize(
    ("place", "right"), [((10, 20), True), ((29.9, 39.9), True), ((30, 20), False), ((9.9, 20), False)]
)
def test_a_click_counts_inside_the_box(place: tuple[float, float], right: bool) -> None:
    box, screen = Box(10, 20, 30, 40), Size(100, 200)
    there = Place(place[0] / 100, place[1] / 200)
    point = Point(*place)
    assert click_in_box(Answer((PlacedAction(Click(point), there),), screen), box) == right
    assert not click_in_box(Answer((PlacedAction(Hover(point), there),), screen), box)
    assert not click_in_box(Answer((), screen), box)


@pytest.mark.parametrize(("task", "screenshots"), [("click", {1}), ("trajectory", {3, 4, 5})])
def test_the_suite_itself_can_be_asked(
    starkv: Command, reciting: ChatModel, task: str, screenshots: set[int]
) -> None:
    samples = load(parse_task(task), "test", 3, 4).samples
    assert {1 + len(sample.earlier) for sample in samples} <= screenshots
    assert all(sample.target and sample.target.area > 0 for sample in samples)
    arguments = ("--task", task, "--n", 2, "--seed", 3, "--max-new-tokens", 8, "--json")
    ran = starkv("eval", "--suite", "synthetic", "--engine", reciting.engine, *arguments)
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out)
    assert summary["samples"] + summary["skipped"] == 2
    assert 0 <= summary["accuracy"] <= 1
