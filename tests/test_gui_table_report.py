# SPDX-License-Identifier: Apache-2.0
"""The table's figures against values worked out by hand, and the report made from the records alone."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plots
import pytest
import report
from cells import Cell, TableRecord
from figures import ALL, Figure, figures_of
from gui_table_cases import settings
from report_text import suite_sections
from rows import ENGINE_ROWS, NATIVE, OFFICIAL

from starkv.errors import UsageError
from starkv.evaluation.records import RecordFile
from starkv.evaluation.statistics import wilson_interval


def cell(hit: bool, distance: float | None = 5.0, acted: tuple[str, ...] = (), held: int = 20) -> Cell:
    point = None if distance is None else (1.0, 2.0)
    return Cell(text="x", point=point, hit=hit, distance=distance, rows=held / 2, bytes=held, acted=acted)


def record(number: int, group: str, task: str, **cells: Cell) -> TableRecord:
    names = {"full": ("full", "1"), "official": (OFFICIAL, "0.2"), "snapkv": ("snapkv", "0.2")}
    by_row = {names[name][0]: {names[name][1]: each} for name, each in cells.items()}
    return TableRecord(
        id=f"{number}",
        task=task,
        group=group,
        frames=1,
        size=(30, 40),
        prompt_rows=50,
        full_bytes=100,
        cells=by_row,
    )


def eight() -> list[TableRecord]:
    """Eight questions of two screens: full is always right, SnapKV on the first six, official on the last."""
    return [
        record(
            number,
            "one" if number < 4 else "two",
            "icon" if number % 2 else "word",
            full=cell(True, held=100),
            snapkv=cell(number < 6, 10.0 if number else None),
            official=cell(number == 7, acted=("boost", "prior") if number < 3 else ("boost",)),
        )
        for number in range(8)
    ]


def only(figures: Sequence[Figure], row: str, budget: float = 0.2) -> Figure:
    (found,) = [figure for figure in figures if (figure.row, figure.budget) == (row, budget)]
    return found


def test_figures_are_those_of_the_records() -> None:
    figures = figures_of("click", eight())
    snapkv, official = only(figures, "snapkv"), only(figures, OFFICIAL)
    assert (snapkv.questions, snapkv.hits, snapkv.accuracy) == (8, 6, 0.75)
    assert (snapkv.low, snapkv.high) == wilson_interval(6, 8)
    # A screen of 30 x 40 has a diagonal of 50; the reply that clicks nowhere has no distance.
    assert (snapkv.clicks, snapkv.distance, snapkv.distance_share) == (7, 10.0, pytest.approx(0.2))
    assert (snapkv.bytes_share, snapkv.bytes_mean, snapkv.rows_share) == (0.2, 20, 0.2)
    assert official.acted == {"boost": 8, "prior": 3}
    assert only(figures_of("click", eight(), "icon"), "snapkv").questions == 4


def test_rows_are_compared_question_by_question() -> None:
    figures = figures_of("click", eight())
    against = only(figures, "snapkv").comparisons
    assert set(against) == {OFFICIAL, "full"}
    split = against[OFFICIAL].discordance
    assert (split.only_first, split.only_second) == (6, 1)
    assert against[OFFICIAL].difference == 5 / 8
    # 2 (1 + 7) / 128, and of two rows against official full is the surer one: 2 / 128 for 7 to 0.
    assert against[OFFICIAL].p_value == pytest.approx(0.125)
    full = only(figures, "full", 1.0).comparisons
    assert set(full) == set()
    # Whole screens are drawn: SnapKV leads by 4 of 4 on the first and 1 of 4 on the second.
    assert (against[OFFICIAL].low, against[OFFICIAL].high) == (0.25, 1.0)
    assert only(figures, OFFICIAL).comparisons["snapkv"].difference == -5 / 8


def test_rows_with_fewer_questions_are_compared_on_those() -> None:
    records = eight()
    few = record(6, "two", "word", snapkv=cell(True))
    few = few.model_copy(update={"cells": {"h2o (reference)": {"0.2": cell(True)}}})
    reference = only(figures_of("click", [*records, few]), "h2o (reference)")
    assert reference.questions == reference.comparisons["snapkv"].questions == 1
    assert reference.comparisons["snapkv"].difference == 1.0


def test_ablations_are_compared_with_native() -> None:
    changed = {NATIVE: {"0.2": cell(True)}, "native - boost": {"0.2": cell(False)}}
    records = [each.model_copy(update={"cells": each.cells | changed}) for each in eight()]
    assert NATIVE in only(figures_of("click", records), "native - boost").comparisons
    assert NATIVE not in only(figures_of("click", eight()), "snapkv").comparisons


def write_records(folder: Path, records: Sequence[TableRecord], **changes: object) -> None:
    written = RecordFile(folder, settings(ENGINE_ROWS, suite="click", budgets=[0.2], **changes), TableRecord)
    for each in records:
        written.add(each)


def test_report_says_what_the_records_say() -> None:
    records = eight() * 1
    figures = [figure for task in (ALL, "icon", "word") for figure in figures_of("click", records, task)]
    text = suite_sections("click", settings(), records, figures)
    assert "8 questions of 2 screens, prompts of 50 to 50 rows. The full cache: 100.0 (67.6–100.0) %" in text
    assert "| snapkv | 75.0 (40.9–92.9) |" in text
    assert "spatial prior 3; of these telling groups apart 0; temporal discount 0; entropy moved" in text
    assert "| snapkv | 10.0 px (20.0%), 88% click |" in text
    assert "| snapkv | +62.5 (+25.0 to +100.0) |" in text


def test_stars_follow_the_adjusted_test() -> None:
    records = [
        record(number, f"{number}", "word", snapkv=cell(True), official=cell(False)) for number in range(12)
    ]
    text = suite_sections("click", settings(), records, figures_of("click", records))
    # 2 / 4096 is below 0.001.
    assert "| snapkv | +100.0\\*\\*\\* (+100.0 to +100.0) |" in text


def test_a_report_is_made_from_the_records_alone(tmp_path: Path) -> None:
    write_records(tmp_path / "click", eight())
    report.write_report(tmp_path)
    first = (tmp_path / "report.md").read_text()
    with (tmp_path / "table.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    line = next(each for each in lines if (each["task"], each["row"]) == ("all", "snapkv"))
    assert (line["hits"], line["accuracy"], line["prior_acted"]) == ("6", "0.75", "")
    assert line["p_value vs star_kv official"] == "0.125"
    (tmp_path / "report.md").unlink()
    report.write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == first


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no records"):
        report.read_runs(tmp_path)
    write_records(tmp_path / "click", eight())
    write_records(tmp_path / "click-reference", eight(), place="reference", seed=1)
    with pytest.raises(UsageError, match="seed is 1, but 0 in another run"):
        report.read_runs(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", json.dumps({"engine": 1})])
def test_settings_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    write_records(tmp_path / "click", eight())
    (tmp_path / "click" / "settings.json").write_text(content)
    with pytest.raises(UsageError, match=r"settings\.json can't be read"):
        report.read_runs(tmp_path)


def test_labels_keep_their_distance_and_order() -> None:
    assert plots.spread([0.1, 0.5, 0.9], 0.1, 0.0, 1.0) == pytest.approx([0.1, 0.5, 0.9])
    assert plots.spread([0.5, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.45, 0.55])
    assert plots.spread([], 0.1, 0.0, 1.0) == []
    wanted = np.random.default_rng(0).random(9).tolist()
    placed = plots.spread(wanted, 0.1, 0.0, 1.0)
    assert np.argsort(placed).tolist() == np.argsort(wanted).tolist()
    assert np.diff(sorted(placed)).min() >= 0.1 - 1e-9
    assert min(placed) >= 0.0
    assert max(placed) <= 1.0 + 1e-9
    crowded = plots.spread([0.5] * 30, 0.1, 0.0, 1.0)
    assert max(crowded) <= 1.0 + 1e-9


def test_no_two_rows_look_alike() -> None:
    names = [row.name for row in ENGINE_ROWS] + [f"other {number}" for number in range(12)]
    styles = plots.styles_of(names)
    assert set(styles) == set(names) - {"full"}
    looks = {(style.color, style.dashes, style.marker) for style in styles.values()}
    assert len(looks) == len(styles)
