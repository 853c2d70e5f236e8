# SPDX-License-Identifier: Apache-2.0
"""``starkv eval`` from a data set to a report: accuracy, resuming, refusals."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from benchmark_data import (
    SCREEN,
    gesture,
    pro,
    spot,
    step,
    task,
    write,
    write_agentnet_bench,
    write_android_control,
    write_screenspot_pro,
    write_screenspot_v2,
)
from command import Command, Outcome
from conftest import ChatModel
from PIL import Image

from starkv.evaluation.answers import Place
from starkv.evaluation.graders.desktop import DesktopAction
from starkv.evaluation.prompts import past_reply, question_of, written_calls
from starkv.evaluation.suites.registry import SUITES
from starkv.manifest import read_manifest
from starkv.runtime.actions.coordinates import Size
from starkv.runtime.actions.parser import parse_response
from starkv.runtime.session import Session

STAR = (39, 268, 66, 295)
"""Where the red star of the example is, in pixels."""
EXAMPLE = Path(__file__).parent.parent / "examples" / "screen.png"

Evaluate = Callable[..., Outcome]


@pytest.fixture
def evaluate(starkv: Command, reciting: ChatModel) -> Evaluate:
    """``starkv eval`` with the engine that clicks on (56, 28) whatever it sees."""
    return partial(starkv, "eval", "--engine", reciting.engine, "--max-new-tokens", 8)


@pytest.fixture
def spots(tmp_path: Path) -> Path:
    """Four samples of ScreenSpot-v2: texts are hit once of twice, icons never."""
    entries = [spot(), spot(hit=False), spot("icon", hit=False), spot("icon", hit=False)]
    return write_screenspot_v2(tmp_path / "spots", web=entries)


def test_the_embedded_model_clicks_the_star(starkv: Command, tmp_path: Path) -> None:
    left, top, right, bottom = STAR
    star = spot(instruction="Click the red star.", bbox=[left, top, right - left, bottom - top])
    folder = write_screenspot_v2(tmp_path / "data", web=[star])
    with Image.open(EXAMPLE) as example:
        example.save(folder / "screenspotv2_image" / "screen.png")
    arguments = ("eval", "--suite", "screenspot-v2", "--data", folder, "--engine", "gui-tiny", "--json")
    whole = json.loads(starkv(*arguments).out)
    assert (whole["accuracy"], whole["samples"], whole["kv_kept_share"]) == (1, 1, 1)
    assert (whole["settings"]["dialect"], whole["rule"]) == ("plain", "point-in-box")
    less = json.loads(starkv(*arguments, "--kv-budget", 0.6, "--kv-mode", "official", "--out", "run").out)
    assert less["kv_kept_share"] == pytest.approx(0.6, abs=0.01)
    assert less["settings"]["kv"] == {
        "method": "star_kv",
        "mode": "official",
        "budget": 0.6,
        "capacity": None,
    }
    (line,) = Path("run/records.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["reply"].startswith("Action: click(")
    assert record["action"]["type"] == "click"
    assert left <= record["point"][0] <= right
    assert record["kv_tokens_kept"] < record["kv_tokens_full"]
    assert record["timings"]["prefill_ms"] > 0


def test_the_table_goes_to_stdout_and_the_reports_beside_the_records(evaluate: Evaluate, spots: Path) -> None:
    ran = evaluate("--suite", "screenspot-v2", "--data", spots, "--out", "run")
    assert ran.code == 0
    assert "overall" in ran.out
    assert "25.00%" in ran.out
    assert "without --out" not in ran.err
    assert "4 samples answered, 0 skipped" in ran.err
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "records.jsonl",
        "report.json",
        "report.md",
        "settings.json",
    ]
    report = json.loads(Path("run/report.json").read_text())
    assert report["accuracy"] == 0.25
    assert (report["metrics"][0]["name"], report["skipped"], report["no_action"]) == ("overall", 0, 0)
    assert "| overall | point-in-box | 25.00% |  | 4 |" in Path("run/report.md").read_text()


def test_every_suite_runs(evaluate: Evaluate, tmp_path: Path) -> None:
    click = {"action_type": "click", "x": 55, "y": 25}
    folders = {
        "screenspot-pro": write_screenspot_pro(tmp_path / "pro", a=[pro("a"), pro("b", hit=False)]),
        "android-control": write_android_control(tmp_path / "phone", [step(0, click), step(1)]),
        "agentnet-bench": write_agentnet_bench(
            tmp_path / "desktop", task("t", [gesture()], [{"type": "wait", "params": {}}])
        ),
    }
    for suite, folder in folders.items():
        ran = evaluate("--suite", suite, "--data", folder, "--json", "--kv-budget", 0.5)
        summary = json.loads(ran.out)
        assert (summary["suite"], summary["accuracy"], summary["samples"]) == (suite, 0.5, 2)
        assert "without --out nothing is written" in ran.err


def test_a_run_that_was_killed_goes_on(
    evaluate: Evaluate, spots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--suite", "screenspot-v2", "--data", spots, "--json")
    reference = json.loads(evaluate(*arguments).out)
    assert json.loads(evaluate(*arguments, "--out", "run", "--limit", 2).out)["samples"] == 2
    path = Path("run/records.jsonl")
    # Killed while the second record was written.
    path.write_bytes(path.read_bytes()[:-20])
    asked = []
    reply = Session.reply

    def counted(self: Session, *given: object) -> object:
        asked.append(given)
        return reply(self, *given)

    monkeypatch.setattr(Session, "reply", counted)
    ran = evaluate(*arguments, "--out", "run")
    assert "1 of 4 samples are answered" in ran.err
    assert len(asked) == 3
    summary = json.loads(ran.out)
    assert summary["metrics"] == reference["metrics"]
    assert len(path.read_text().splitlines()) == 4
    evaluate(*arguments, "--out", "run")
    assert len(asked) == 3


def test_a_trajectory_keeps_its_memory_or_starts_over(evaluate: Evaluate, tmp_path: Path) -> None:
    steps = [[gesture()] for _ in range(3)]
    folder = write_agentnet_bench(tmp_path / "desktop", task("a", *steps), task("b", *steps))
    arguments = ("--suite", "agentnet-bench", "--data", folder, "--out", "run", "--kv-budget", 0.5)
    whole = evaluate(*arguments, "--json")
    path = Path("run/records.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    resumed = evaluate(*arguments, "--json")
    assert "3 of 6 samples are answered" in resumed.err
    assert json.loads(resumed.out)["metrics"] == json.loads(whole.out)["metrics"]
    kept = [json.loads(line)["kv_tokens_kept"] for line in lines]
    # Prompts grow with the history, and both trajectories are alike.
    assert kept[0] < kept[1] < kept[2]
    assert kept[:3] == kept[3:]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--kv-budget", 0.5, "kv.method is full there and star_kv here"),
        ("--max-new-tokens", 9, "max_new_tokens is 8 there and 9 here"),
        ("--dialect", "opencua", "dialect is plain there and opencua here"),
    ],
)
def test_other_settings_are_refused(
    evaluate: Evaluate, spots: Path, option: str, value: object, message: str
) -> None:
    arguments = ("--suite", "screenspot-v2", "--data", spots, "--out", "run", "--limit", 1)
    assert evaluate(*arguments).code == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    refused = evaluate(*arguments, option, value)
    assert (refused.code, refused.out) == (2, "")
    assert message in refused.err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_what_is_skipped_is_named_and_counted(evaluate: Evaluate, spots: Path) -> None:
    entries = json.loads((spots / "screenspot_web_v2.json").read_text())
    entries += [spot(bbox="?"), spot(img_filename="gone.png"), spot(img_filename="broken.png")]
    write(spots / "screenspot_web_v2.json", entries)
    (spots / "screenspotv2_image" / "broken.png").write_bytes(b"no image")
    ran = evaluate("--suite", "screenspot-v2", "--data", spots, "--out", "run", "--json")
    assert ran.code == 0
    for line in (
        "skipped: screenspot_web_v2.json, entry 4: bbox: ",
        "skipped: screenspot_web_v2.json, entry 5: image 'gone.png' is missing",
        "skipped: broken.png, web/6: ",
        "warning: screenspot_mobile_v2.json is missing",
        "warning: samples skipped: 3;",
    ):
        assert line in ran.err
    summary = json.loads(ran.out)
    assert (summary["samples"], summary["skipped"], summary["accuracy"]) == (4, 3, 0.25)
    assert [problem["entry"] for problem in summary["problems"]] == ["entry 4", "entry 5", "web/6"]
    assert "image 'gone.png' is missing" in Path("run/report.md").read_text()


def test_an_image_of_another_size_is_skipped(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = write_screenspot_pro(tmp_path / "pro", a=[pro("a"), pro("b", img_size=[10, 10])])
    ran = evaluate("--suite", "screenspot-pro", "--data", folder, "--json")
    assert json.loads(ran.out)["skipped"] == 1
    assert "has 196x140 pixels, img_size says 10x10" in ran.err


def test_a_failed_step_loses_the_rest_of_its_trajectory(evaluate: Evaluate, tmp_path: Path) -> None:
    wrong = task("a", [gesture()], [gesture()], [gesture()])
    wrong["steps"][1]["image"] = "broken.png"
    folder = write_agentnet_bench(tmp_path / "desktop", wrong)
    (folder / "test_data" / "images" / "broken.png").write_bytes(b"no image")
    ran = evaluate("--suite", "agentnet-bench", "--data", folder, "--json")
    summary = json.loads(ran.out)
    assert (summary["samples"], summary["skipped"]) == (1, 2)
    assert "skipped (2 samples): broken.png, a/1: " in ran.err


def nothing_is_an_image(folder: Path) -> None:
    write_screenspot_v2(folder, web=[spot()])
    (folder / "screenspotv2_image" / "screen.png").write_bytes(b"")


ONE = partial(write_screenspot_v2, web=[spot()])
BAD = [
    (
        "screenspot",
        lambda folder: None,
        (),
        "unknown suite 'screenspot'; known: screenspot-v2,",
    ),
    ("screenspot-v2", lambda folder: None, (), "is no screenspot-v2 data set: expected"),
    ("screenspot-v2", partial(write_screenspot_v2, web=[]), (), "holds no samples"),
    (
        "screenspot-v2",
        partial(write_screenspot_v2, web=[{}]),
        (),
        "could be asked; 1 of 1 samples",
    ),
    ("screenspot-v2", nothing_is_an_image, (), "could be asked; 1 of 1 samples"),
    ("screenspot-v2", ONE, ("--level", "x"), "unknown level 'x'"),
    (
        "screenspot-v2",
        partial(write_screenspot_v2, web=[spot()]),
        ("--dialect", "x"),
        "unknown prompt",
    ),
    ("screenspot-v2", ONE, ("--kv-method", "x"), "unknown KV method"),
    (
        "screenspot-v2",
        partial(write_screenspot_v2, web=[spot()]),
        ("--kv-budget", 2),
        "a KV budget is",
    ),
]


@pytest.mark.parametrize(("suite", "make", "options", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_one_line(
    evaluate: Evaluate,
    tmp_path: Path,
    suite: str,
    make: Callable[[Path], object],
    options: tuple[object, ...],
    message: str,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    ran = evaluate("--suite", suite, "--data", folder, *options)
    assert (ran.code, ran.out) == (2, "")
    *notes, line = ran.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not any("Traceback" in note for note in notes)


def test_a_prompt_that_is_too_long_is_skipped(starkv: Command, reciting: ChatModel, spots: Path) -> None:
    arguments = ("--suite", "screenspot-v2", "--data", spots, "--max-new-tokens", 10_000)
    ran = starkv("eval", "--engine", reciting.engine, *arguments)
    assert ran.code == 2
    assert "engine was built for" not in ran.out
    assert "4 of 4 samples" in ran.err


def test_replies_that_are_no_action_are_wrong_and_counted(
    starkv: Command, babbling: ChatModel, spots: Path
) -> None:
    arguments = ("--suite", "screenspot-v2", "--data", spots, "--max-new-tokens", 4, "--json")
    summary = json.loads(starkv("eval", "--engine", babbling.engine, *arguments).out)
    assert (summary["accuracy"], summary["no_action"]) == (0, 4)


def test_a_trajectory_shows_five_screenshots_and_tells_of_ten_steps(
    reciting: ChatModel, tmp_path: Path
) -> None:
    folder = write_agentnet_bench(tmp_path, task("t", *[[gesture()] for _ in range(13)]))
    last = SUITES["agentnet-bench"].load(folder, "high").samples[-1]
    manifest = read_manifest(reciting.engine)
    question = question_of(last, "ui_tars_computer", manifest)
    roles = [str(message["role"]) for message in question.messages]
    assert len(question.images) == 5
    assert roles.count("assistant") == 10
    assert roles[0] == "system"
    # Six steps in words, four with their screenshots, then the instruction and the current screenshot.
    assert roles[1:] == ["assistant"] * 6 + ["user", "assistant"] * 4 + ["user", "user"]
    assert "click the red star" in str(question.messages[-2])
    assert question.messages[1]["content"] == (
        "Thought: thought 2\nAction: click(start_box='<|box_start|>(56,28)<|box_end|>')"
    )
    assert len(question_of(last, "opencua", manifest).images) == 1
    with Image.open(folder / "test_data" / "images" / "screen.png") as image:
        words = past_reply(last.history[0], "opencua", image, manifest)
    assert words == "Thought: thought 0\nAction: step 0"


@pytest.mark.parametrize(
    ("actions", "calls"),
    [
        ([DesktopAction("rightclick", Place(0.5, 0.25))], ["right_single(start_box='(500,250)')"]),
        (
            [DesktopAction("moveto", Place(0, 0)), DesktopAction("dragto", Place(1, 1))],
            ["drag(start_box='(0,0)', end_box='(1000,1000)')"],
        ),
        ([DesktopAction("moveto", Place(0, 0))], ["hover(start_box='(0,0)')"]),
        (
            [DesktopAction("write", text="it's \\ here"), DesktopAction("keys", keys=("enter",))],
            ["type(content='it\\'s \\\\ here\\n')"],
        ),
        ([DesktopAction("keys", keys=("ctrl", "c"))], ["hotkey(key='ctrl c')"]),
        ([DesktopAction("scroll", text="up")], ["scroll(direction='up')"]),
        ([DesktopAction("terminate", text="success")], ["finished(content='')"]),
        ([DesktopAction("terminate", text="failure")], ["call_user()"]),
        ([DesktopAction("wait"), DesktopAction("wait")], ["wait()", "wait()"]),
    ],
)
def test_earlier_steps_are_written_as_the_model_would(actions: list[DesktopAction], calls: list[str]) -> None:
    written = written_calls(actions, Size(1000, 1000), boxed=False)
    assert written == calls
    assert len(parse_response("Action: " + "\n\n".join(written)).actions) == len(calls)


def test_screens_are_seen_as_they_are() -> None:
    assert SCREEN == (7 * 28, 5 * 28)
