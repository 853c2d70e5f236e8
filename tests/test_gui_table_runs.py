# SPDX-License-Identifier: Apache-2.0
"""Runs of the table: what they remember, how they go on, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import table
from asking import Asker
from cells import TableRecord, TableSettings
from gui_table_cases import LATE_PRIOR, ask, sample, settings
from rows import NATIVE, OFFICIAL, Row
from running import run, trajectories

from starkv.errors import UsageError
from starkv.evaluation.records import RECORDS_FILE, RecordFile
from starkv.methods.star_kv_config import StarKVConfig
from starkv.runtime.agent import Agent
from starkv.synthetic.samples import Sample

ROWS = (Row(OFFICIAL, "star_kv", StarKVConfig.official()), Row("snapkv", "snapkv"))
TAU = StarKVConfig.official(mi_tau=2.0)


@pytest.fixture(scope="module")
def agent(gui_tiny_engine: Path) -> Agent:
    return Agent.load(gui_tiny_engine)


@pytest.mark.parametrize(("carries", "expected"), [(True, [0, 1, 0, 1]), (False, [0, 0, 0, 0])])
def test_memory_lasts_as_long_as_a_trajectory(
    agent: Agent, tmp_path: Path, carries: bool, expected: list[int]
) -> None:
    samples = [sample(0), sample(1), sample(0, "b"), sample(1, "b")]
    records = RecordFile(tmp_path, settings((LATE_PRIOR,)), TableRecord)
    run(samples, carries, Asker(agent, (LATE_PRIOR,), [0.3], 1), records, lambda _: None)
    found = [record.cells[LATE_PRIOR.name]["0.3"].acted for record in records.records.values()]
    assert ["prior" in acted for acted in found] == expected


@pytest.mark.parametrize("answers", [1, 3])
def test_an_interrupted_run_ends_as_one_that_was_not(agent: Agent, tmp_path: Path, answers: int) -> None:
    rows = (LATE_PRIOR, Row("snapkv", "snapkv"))
    samples = [sample(0), sample(1), sample(0, "b"), sample(1, "b")]

    def go(name: str, stop_after: int | None = None) -> list[str]:
        asked: list[str] = []

        class Counting(Asker):
            def ask(self, sample: Sample) -> TableRecord:
                if len(asked) == stop_after:
                    raise KeyboardInterrupt
                asked.append(sample.id)
                return super().ask(sample)

        records = RecordFile(tmp_path / name, settings(rows), TableRecord)
        run(samples, True, Counting(agent, rows, [0.3], 1), records, lambda _: None)
        return asked

    go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("parts", answers)
    # The trajectory at work starts over, those before it don't.
    assert go("parts") == [each.id for each in samples[answers // 2 * 2 :]]
    whole, parts = (tmp_path / name / RECORDS_FILE for name in ("whole", "parts"))
    assert parts.read_text() == whole.read_text()


def test_samples_of_a_group_are_one_trajectory_if_memory_is_carried() -> None:
    samples = [sample(0), sample(1), sample(0, "b")]
    assert [len(steps) for steps in trajectories(samples, True)] == [2, 1]
    assert [len(steps) for steps in trajectories(samples, False)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (settings(ROWS, engine_hash="2"), "engine_hash is 1 there and 2 here"),
        (settings(ROWS, budgets=[0.3, 0.4]), r"budgets is \[0.3\] there"),
        (settings(ROWS[:1]), "rows.snapkv is there and not here"),
        (settings((*ROWS, LATE_PRIOR)), "rows.late prior is no object there"),
        (
            settings((replace(ROWS[0], star_kv=TAU), ROWS[1])),
            r"rows.star_kv official.mi_tau is 1.0 there and 2.0",
        ),
    ],
)
def test_records_of_another_table_are_refused(tmp_path: Path, other: TableSettings, message: str) -> None:
    RecordFile(tmp_path, settings(ROWS), TableRecord)
    with pytest.raises(UsageError, match=message):
        RecordFile(tmp_path, other, TableRecord)


def test_a_damaged_record_is_refused(agent: Agent, tmp_path: Path) -> None:
    records = RecordFile(tmp_path, settings(), TableRecord)
    (record,) = ask(agent, [sample(0)], (Row("snapkv", "snapkv"),), [0.3])
    records.add(record)
    assert RecordFile(tmp_path, settings(), TableRecord).records == {record.id: record}
    path = tmp_path / RECORDS_FILE
    path.write_text(path.read_text().replace('"hit":', '"miss":'))
    with pytest.raises(UsageError, match="line 1 is no record"):
        RecordFile(tmp_path, settings(), TableRecord)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "0"], "share of the prompt"),
        (["--count", "0"], "--count must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--rows", "full", "fall"], "unknown row 'fall'; known: full; star_kv native"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        table.parse_arguments(["--engine", "gui-tiny", "--out", "x", *arguments])


def test_ablations_are_measured_on_the_validation_split() -> None:
    plain = ["--engine", "gui-tiny", "--out", "x"]
    assert table.parse_arguments(plain).split == "test"
    assert table.parse_arguments([*plain, "--ablations"]).split == "validation"
    assert table.parse_arguments([*plain, "--ablations", "--split", "test"]).split == "test"


def test_one_command_makes_everything(gui_tiny_engine: Path, tmp_path: Path) -> None:
    options = ["--engine", str(gui_tiny_engine), "--task", "click", "--count", "2", "--budgets", "0.3"]
    options += ["--rows", "full", OFFICIAL, NATIVE, "snapkv", "--max-new-tokens", "2", "--out", str(tmp_path)]
    table.main(options)
    made = {path.name for path in tmp_path.rglob("*.*")}
    assert {"report.md", "table.csv", "click-budget.png", "click-bytes.png", "click-tasks.png"} <= made
    assert "### Difference to star_kv official" in (tmp_path / "report.md").read_text()
    with pytest.raises(UsageError, match="max_new_tokens is 2 there and 3 here"):
        table.main([*options, "--max-new-tokens", "3"])
