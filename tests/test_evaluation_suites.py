# SPDX-License-Identifier: Apache-2.0
"""Public data sets are read as they are published, and what is wrong with them is named."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from benchmark_data import (
    HIT_XYWH,
    HIT_XYXY,
    draw,
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

from starkv.errors import UsageError
from starkv.evaluation.answers import Answer, Place, PlacedAction
from starkv.evaluation.boxes import Box
from starkv.evaluation.files import data_hash
from starkv.evaluation.graders.desktop import DesktopAction
from starkv.evaluation.samples import Sample
from starkv.evaluation.suites.registry import SUITES
from starkv.runtime.actions.coordinates import Size
from starkv.runtime.actions.types import Click, Point

SCREENSPOT_V2, SCREENSPOT_PRO = SUITES["screenspot-v2"], SUITES["screenspot-pro"]
ANDROID_CONTROL, AGENTNET_BENCH = SUITES["android-control"], SUITES["agentnet-bench"]


def clicked(sample: Sample, x: float, y: float) -> dict[str, float]:
    """Grades of a click on a screen of 100 x 100 pixels."""
    answer = Answer((PlacedAction(Click(Point(0, 0)), Place(x / 100, y / 100)),), Size(100, 100))
    return dict(sample.grade(answer))


def test_bounding_boxes_are_read_in_each_data_sets_convention(tmp_path: Path) -> None:
    """Golden: [50, 20, 60, 30] reaches to (110, 50) in ScreenSpot-v2 and to (60, 30) in ScreenSpot-Pro."""
    numbers = [50, 20, 60, 30]
    write_screenspot_v2(tmp_path / "v2", web=[spot(bbox=numbers)])
    write_screenspot_pro(tmp_path / "pro", all=[pro("a", bbox=numbers)])
    (v2,) = SCREENSPOT_V2.load(tmp_path / "v2", "high").samples
    (large,) = SCREENSPOT_PRO.load(tmp_path / "pro", "high").samples
    for sample, right, bottom in ((v2, 110, 50), (large, 60, 30)):
        assert clicked(sample, right, bottom) == {"point-in-box": 1}
        assert clicked(sample, right + 0.01, bottom) == clicked(sample, right, bottom + 0.01)
        assert clicked(sample, right, bottom + 0.01) == {"point-in-box": 0}
        assert clicked(sample, 50, 20) == {"point-in-box": 1}
        assert clicked(sample, 49.99, 20) == {"point-in-box": 0}


def test_the_boxes_of_the_test_data_are_the_same() -> None:
    assert Box.from_xywh(HIT_XYWH) == Box.from_xyxy(HIT_XYXY)


def test_screenspot_v2(tmp_path: Path) -> None:
    write_screenspot_v2(tmp_path, mobile=[spot(), spot("icon")], web=[spot()])
    loaded = SCREENSPOT_V2.load(tmp_path, "high")
    assert [sample.id for sample in loaded.samples] == ["mobile/0", "mobile/1", "web/0"]
    assert [dict(sample.facets) for sample in loaded.samples] == [
        {"platform": "mobile", "type": "text"},
        {"platform": "mobile", "type": "icon"},
        {"platform": "web", "type": "text"},
    ]
    assert loaded.samples[0].instruction == "click the red star"
    assert loaded.notes == ["screenspot_desktop_v2.json is missing, so nothing is asked about desktop"]


def test_screenspot_pro(tmp_path: Path) -> None:
    write_screenspot_pro(tmp_path, b=[pro("b1")], a=[pro("a1", "icon", application="word")])
    loaded = SCREENSPOT_PRO.load(tmp_path, "high")
    assert [sample.id for sample in loaded.samples] == ["a1", "b1"]
    assert loaded.samples[0].image == tmp_path / "images" / "apps" / "screen.png"
    assert loaded.samples[0].image_size == Size(196, 140)
    assert loaded.samples[0].facets == {
        "group": "Creative",
        "application": "word",
        "platform": "linux",
        "type": "icon",
    }


def test_android_control_asks_with_the_goal_or_also_with_the_step(tmp_path: Path) -> None:
    write_android_control(tmp_path, [step(0, {"action_type": "click", "x": 55, "y": 25})])
    (high,) = ANDROID_CONTROL.load(tmp_path, "high").samples
    (low,) = ANDROID_CONTROL.load(tmp_path, "low").samples
    earlier = "click the red star\n\nPrevious actions:\n1. open the app\n2. scroll down"
    assert (high.id, high.instruction) == ("7/0", earlier)
    assert low.instruction == f"{earlier}\n\nNext step: click the star"
    assert set(clicked(high, 55, 25).values()) == {1}
    # In the element, but far away; 72 pixels are generous on 100.
    assert clicked(high, 60, 29) == dict.fromkeys(clicked(high, 60, 29), 1)


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ({"action_type": "input_text", "text": "hello"}, "type_text"),
        ({"action_type": "open_app", "app_name": "Clock"}, "open_app"),
        ({"action_type": "scroll", "direction": "up"}, "scroll"),
        ({"action_type": "navigate_home"}, "navigate_home"),
        ({"action_type": "status", "goal_status": "infeasible"}, "status"),
    ],
)
def test_android_controls_other_actions(tmp_path: Path, action: dict[str, object], kind: str) -> None:
    write_android_control(tmp_path, [step(0, action)])
    (sample,) = ANDROID_CONTROL.load(tmp_path, "high").samples
    assert sample.facets == {"action": kind}
    assert set(clicked(sample, 1, 1).values()) == {0}


def test_agentnet_bench_keeps_earlier_steps(tmp_path: Path) -> None:
    scroll = {"type": "scroll", "params": {"amount": -3}}
    keys = {"type": "hotkey", "params": {"keys": ["Ctrl", "S"]}}
    tasks = task("t", [gesture()], [scroll], [keys])
    tasks["steps"][1]["alternative_options"] = [[keys], gesture("doubleClick", boxed=False)]
    write_agentnet_bench(tmp_path, tasks)
    loaded = AGENTNET_BENCH.load(tmp_path, "high")
    assert [sample.id for sample in loaded.samples] == ["t/0", "t/1", "t/2"]
    assert {sample.group for sample in loaded.samples} == {"t"}
    assert [sample.facets["action"] for sample in loaded.samples] == ["click", "scroll", "keys"]
    assert [len(sample.history) for sample in loaded.samples] == [0, 1, 2]
    past = loaded.samples[2].history[1]
    assert (past.thought, past.summary) == ("thought 1", "step 1")
    assert past.actions == (DesktopAction("scroll", text="down"),)
    assert set(clicked(loaded.samples[0], 100 * 56 / 196, 20).values()) == {1}


def test_the_other_names_of_a_task(tmp_path: Path) -> None:
    written = task("t", [{"type": "write", "params": {"content": "hi"}}], user_task_description="other")
    del written["high_level_task_description"]
    write(tmp_path / "test_data" / "all.json", [written])
    draw(tmp_path / "images" / "screen.png")
    (sample,) = AGENTNET_BENCH.load(tmp_path, "high").samples
    assert (sample.instruction, sample.facets["action"]) == ("other", "write")


def v2(folder: Path, **changes: object) -> None:
    write_screenspot_v2(folder, web=[spot(), spot(**changes)])


def large(folder: Path, **changes: object) -> None:
    write_screenspot_pro(folder, all=[pro("a"), pro("b", **changes)])


def phone(folder: Path, **changes: object) -> None:
    write_android_control(folder, [step(0), step(1) | changes])


def desktop(folder: Path, action: dict[str, object] | None = None, **changes: object) -> None:
    write_agentnet_bench(
        folder, task("a", [gesture()]), task("b", [gesture()], [action or gesture()], **changes)
    )


def without_image(folder: Path) -> None:
    desktop(folder)
    path = folder / "test_data" / "b.json"
    path.write_text(path.read_text().replace("screen.png", "gone.png", 1))


BAD_ENTRIES = [
    (
        "screenspot-v2",
        partial(v2, bbox=[1, 2, 3]),
        "screenspot_web_v2.json, entry 1: bbox.3: Field required",
        1,
    ),
    ("screenspot-v2", partial(v2, bbox=[1, 2, 0, 4]), "entry 1: bbox: Value error, the box from", 1),
    (
        "screenspot-v2",
        partial(v2, bbox=[1, 2, float("nan"), 4]),
        "bbox.2: Input should be a finite number",
        1,
    ),
    (
        "screenspot-v2",
        partial(v2, data_type="video"),
        "entry 1: data_type: Input should be 'text' or 'icon'",
        1,
    ),
    ("screenspot-v2", partial(v2, img_filename="gone.png"), "entry 1: image 'gone.png' is missing in", 1),
    ("screenspot-v2", partial(v2, img_filename="../x.png"), "'../x.png' leads out of the data set", 1),
    ("screenspot-v2", partial(v2, img_filename="a\0b"), "'a\\x00b' is no name of a file", 1),
    ("screenspot-v2", partial(v2, img_filename="a" * 300), "aaa' is no name of a file", 1),
    ("screenspot-v2", partial(v2, instruction="\ud800"), "entry 1: instruction: Input should be a valid", 1),
    ("screenspot-pro", partial(large, id="a"), "all.json, entry 1: the id 'a' occurred before", 1),
    ("screenspot-pro", partial(large, bbox=[9, 9, 5, 12]), "entry 1: bbox: Value error", 1),
    (
        "android-control",
        partial(phone, action={"action_type": "click"}),
        "step 1: action: Value error, click needs x",
        1,
    ),
    (
        "android-control",
        partial(phone, action={"action_type": "fly"}),
        "step 1: action.action_type: Input",
        1,
    ),
    ("android-control", partial(phone, step_index=0), "step 0 of episode 7 occurred before", 1),
    (
        "agentnet-bench",
        partial(desktop, action={"type": "write", "params": {}}),
        "write needs params.text",
        2,
    ),
    (
        "agentnet-bench",
        partial(desktop, steps=[]),
        "b.json, the task: steps: List should have at least 1 item",
        1,
    ),
    ("agentnet-bench", partial(desktop, high_level_task_description=""), "String should have at least 1", 2),
    ("agentnet-bench", without_image, "b.json, the task: step 0: image 'gone.png' is missing in", 2),
]


@pytest.mark.parametrize(("suite", "make", "reason", "lost"), BAD_ENTRIES, ids=range(len(BAD_ENTRIES)))
def test_bad_entries_are_named_and_the_others_stay(
    tmp_path: Path, suite: str, make: Callable[[Path], None], reason: str, lost: int
) -> None:
    make(tmp_path)
    loaded = SUITES[suite].load(tmp_path, "high")
    (problem,) = loaded.problems
    assert reason in str(problem)
    assert problem.samples == lost
    assert len(loaded.samples) == 1


def test_a_task_file_that_is_no_json_is_a_lost_task(tmp_path: Path) -> None:
    desktop(tmp_path)
    (tmp_path / "test_data" / "c.json").write_text('{"task_id":')
    (tmp_path / "test_data" / "d.json").write_text("[" * 100_000)
    loaded = AGENTNET_BENCH.load(tmp_path, "high")
    assert [problem.file for problem in loaded.problems] == ["c.json", "d.json"]
    assert len(loaded.samples) == 3


@pytest.mark.parametrize("suite", SUITES)
def test_other_folders_are_refused_with_what_was_expected(tmp_path: Path, suite: str) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match=rf"is no {suite} data set: expected .*json"):
            SUITES[suite].load(folder, "high")


@pytest.mark.parametrize("content", ["[1,", '{"a": 1}', b"\xff\xfe"])
def test_an_annotation_file_that_is_no_list_is_refused(tmp_path: Path, content: str | bytes) -> None:
    write_screenspot_v2(tmp_path, web=[spot()])
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "screenspot_mobile_v2.json").write_bytes(raw)
    with pytest.raises(UsageError, match=r"screenspot_mobile_v2\.json (can't be read|holds no list)"):
        SCREENSPOT_V2.load(tmp_path, "high")


def test_the_hash_sees_annotations_and_images(tmp_path: Path) -> None:
    write_screenspot_v2(tmp_path, web=[spot()])
    first = data_hash(SCREENSPOT_V2.load(tmp_path, "high"))
    assert data_hash(SCREENSPOT_V2.load(tmp_path, "high")) == first
    draw(tmp_path / "screenspotv2_image" / "screen.png", (300, 300))
    second = data_hash(SCREENSPOT_V2.load(tmp_path, "high"))
    path = tmp_path / "screenspot_web_v2.json"
    path.write_text(json.dumps([spot(instruction="other")]))
    third = data_hash(SCREENSPOT_V2.load(tmp_path, "high"))
    assert len({first, second, third}) == 3
