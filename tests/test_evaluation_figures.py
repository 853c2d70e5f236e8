# SPDX-License-Identifier: Apache-2.0
"""Figures of a run against ones worked out by hand, records of a run, and what others have published."""

from pathlib import Path

import pytest

from starkv.errors import UsageError
from starkv.evaluation.metrics import Metric, share
from starkv.evaluation.published import all_published, published_for
from starkv.evaluation.records import KvSettings, Record, RecordFile, Settings
from starkv.evaluation.runner import finished_ids
from starkv.evaluation.samples import Problem, Sample
from starkv.evaluation.statistics import wilson_interval
from starkv.evaluation.suites.registry import SUITES
from starkv.evaluation.summary import summarise

SETTINGS = Settings(
    suite="screenspot-v2",
    data="0",
    engine="tiny",
    engine_hash="1",
    kv=KvSettings(method="star_kv", mode="native", budget=0.2, capacity=None),
    dialect="plain",
    level="high",
    max_new_tokens=8,
    images=5,
)


def record(
    name: str, grade: float = 1, rule: str = "point-in-box", facets: dict[str, str] | None = None
) -> Record:
    return Record(
        id=name,
        group=name,
        facets=facets or {},
        reply="",
        action=None,
        point=None,
        error=None,
        grades={rule: grade},
        kv_tokens_full=10,
        kv_tokens_kept=2.0,
        timings={},
    )


def records_of(*cells: tuple[dict[str, str], int, int]) -> list[Record]:
    """For each ``(facets, right, all)`` so many records."""
    return [
        record(f"{cell}/{n}", float(n < right), facets=facets)
        for cell, (facets, right, total) in enumerate(cells)
        for n in range(total)
    ]


def test_wilson_interval() -> None:
    # 8 of 10, by the formula and by R's binom::binom.confint(8, 10, methods = "wilson").
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(10, 10)[1] == 1
    assert wilson_interval(0, 10)[0] == 0


def test_screenspot_v2_is_the_mean_of_means() -> None:
    records = records_of(
        ({"platform": "mobile", "type": "text"}, 3, 4),
        ({"platform": "mobile", "type": "icon"}, 1, 2),
        ({"platform": "desktop", "type": "text"}, 1, 4),
        ({"platform": "web", "type": "icon"}, 1, 10),
    )
    metrics = SUITES["screenspot-v2"].summarise(records)
    values = {metric.name: metric.value for metric in metrics}
    # Text (0.75 + 0.25) / 2, icon (0.5 + 0.1) / 2; 6 of 20 of all.
    assert values["average text"] == 0.5
    assert values["average icon"] == pytest.approx(0.3)
    assert (metrics[0].name, metrics[0].value, metrics[0].count) == ("overall", pytest.approx(0.4), 20)
    assert values["mobile"] == 0.625
    assert values["all samples"] == 0.3
    assert values["type icon"] == pytest.approx(2 / 12)
    assert metrics[0].low is None
    assert "desktop icon" not in values


def test_screenspot_pro_counts_samples() -> None:
    cell = {"group": "Creative", "application": "gimp", "platform": "linux"}
    other = {"group": "Office", "application": "word", "platform": "linux"}
    records = records_of(
        ({**cell, "type": "text"}, 3, 4), ({**cell, "type": "icon"}, 0, 1), ({**other, "type": "text"}, 1, 5)
    )
    values = {
        metric.name: (metric.value, metric.count) for metric in SUITES["screenspot-pro"].summarise(records)
    }
    assert values["action_acc"] == (0.4, 10)
    assert values["text_acc"] == (pytest.approx(4 / 9), 9)
    assert values["icon_acc"] == (0, 1)
    assert values["group Creative: action_acc"] == (0.6, 5)
    assert values["application word: text_acc"] == (0.2, 5)
    assert values["platform linux: action_acc"] == (0.4, 10)


def test_rules_count_only_where_they_apply() -> None:
    lenient, point = "lenient-10%-or-72px", "grounding-lenient-10%-or-72px"
    records = [record("a", 1, lenient, {"action": "click"}), record("b", 0, lenient, {"action": "wait"})]
    records[0].grades[point] = 1.0
    metrics = SUITES["android-control"].summarise(records)
    found = {(metric.name, metric.rule): (metric.value, metric.count) for metric in metrics}
    assert found["step accuracy", lenient] == (0.5, 2)
    assert found["grounding accuracy", point] == (1, 1)
    assert found["action wait", lenient] == (0, 1)


def test_partial_credit_is_averaged() -> None:
    rule = "first-action-exp-distance"
    records = [record("a", 0.5, rule, {"action": "click"}), record("b", 1, rule, {"action": "scroll"})]
    metrics = SUITES["agentnet-bench"].summarise(records)
    assert (metrics[0].rule, metrics[0].value) == (rule, 0.75)
    low, high = wilson_interval(1.5, 2)
    assert share("step accuracy", rule, records) == Metric("step accuracy", rule, 0.75, 2, low, high)


def test_published_figures_have_sources_and_marks() -> None:
    figures = all_published()
    assert all(figure.source and 0 < figure.value < 1 and 0 < figure.budget <= 1 for figure in figures)
    beside = published_for("screenspot-pro", "ui-tars-1.5-7b", 0.2)
    assert {figure.budget for figure in beside} == {0.2, 1.0}
    assert 0.409 in {
        figure.value for figure in beside if figure.method == "star_kv" and not figure.second_hand
    }
    assert any("second-hand" in figure.origin for figure in beside)
    assert published_for("screenspot-pro", "gui-tiny", 0.2) == []


def test_records_come_back_without_the_line_that_was_cut_off(tmp_path: Path) -> None:
    written = RecordFile(tmp_path, SETTINGS, Record)
    written.add(record("a"))
    written.add(record("b"))
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    read = RecordFile(tmp_path, SETTINGS, Record)
    assert list(read.records) == ["a"]
    read.keep(["a"])
    assert path.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine_hash": "2"}, "engine_hash is 1 there and 2 here"),
        ({"kv": SETTINGS.kv.model_copy(update={"budget": 0.4})}, "kv.budget is 0.2 there and 0.4 here"),
        (
            {"data": "x", "suite": "screenspot-pro"},
            "suite is screenspot-v2 there and screenspot-pro here; data is",
        ),
    ],
)
def test_records_of_other_settings_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    RecordFile(tmp_path, SETTINGS, Record)
    with pytest.raises(UsageError, match=message):
        RecordFile(tmp_path, SETTINGS.model_copy(update=changes), Record)


@pytest.mark.parametrize(
    ("name", "content"), [("settings.json", "{"), ("settings.json", "[]"), ("records.jsonl", "x\n")]
)
def test_what_is_no_run_is_refused(tmp_path: Path, name: str, content: str) -> None:
    RecordFile(tmp_path, SETTINGS, Record)
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        RecordFile(tmp_path, SETTINGS, Record)


def test_records_without_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"records\.jsonl without settings\.json"):
        RecordFile(tmp_path, SETTINGS, Record)


def test_an_interrupted_trajectory_starts_over() -> None:
    def sample(name: str, group: str) -> Sample:
        return Sample(name, group, Path(), "", {}, lambda answer: {})

    samples = [sample("a/0", "a"), sample("a/1", "a"), sample("b/0", "b"), sample("b/1", "b")]
    # "c" is of a run with a higher limit.
    assert finished_ids(samples, ["a/0", "a/1", "b/0", "c"]) == {"a/0", "a/1", "c"}


def test_others_figures_stand_beside_ones_own_and_are_marked(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"suite": "screenspot-pro", "engine": "ui-tars-1.5-7b"})
    facets = {"group": "Office", "application": "word", "platform": "linux", "type": "text"}
    records = [record("a", 1, facets=facets), record("b", 0, facets=facets)]
    problems = [Problem("a.json", "entry 3", "bbox: missing", 2)]
    summary = summarise(SUITES["screenspot-pro"], settings, records, problems, [], limit=4)
    assert (summary.headline.value, summary.skipped, summary.kept_share) == (0.5, 2, 0.2)
    summary.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    own, others = text.split("Published by others")
    assert "| action_acc | point-in-box | 50.00% | 9.5%–90.5% | 2 |" in own
    assert "| star_kv | 20% | 40.90% | action_acc | STaR-KV, README" in others
    assert "table 5; second-hand |" in others
    assert "* a.json, entry 3: bbox: missing" in others
    assert "10%" not in others
