# SPDX-License-Identifier: Apache-2.0
"""From records to figures: accuracy, distance, bytes, components, paired comparisons."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cells import Cell, TableRecord
from rows import BASELINES, NATIVE

from starkv.evaluation.paired import Discordance, cluster_intervals, holm
from starkv.evaluation.statistics import wilson_interval
from starkv.methods.names import FULL

ALL = "all"
"""In place of a task: every question of a suite."""
Key = tuple[str, float]
"""Row and budget."""


@dataclass(frozen=True)
class Comparison:
    """One cell against a baseline at the same budget, on the questions that both were asked."""

    baseline: str
    questions: int
    difference: float
    """Of the accuracies."""
    low: float
    """Bounds of the difference, 95 %, by a bootstrap over screens or episodes."""
    high: float
    discordance: Discordance
    p_value: float
    """Exact McNemar test."""
    p_adjusted: float
    """After Holm, over all rows and budgets against this baseline."""


@dataclass(frozen=True)
class Figure:
    """One cell of the table over many questions."""

    suite: str
    task: str
    row: str
    budget: float
    questions: int
    hits: int
    accuracy: float
    low: float
    """Wilson interval, 95 %."""
    high: float
    clicks: int
    """Replies that click at all; distances are about these."""
    distance: float | None
    """Mean pixels from the click to the middle of the box."""
    distance_share: float | None
    """Mean of the same as share of the screen's diagonal."""
    rows_share: float
    """Rows kept, as share of the prompts' rows."""
    bytes_share: float
    """Bytes held, as share of the uncompressed prompts'."""
    bytes_mean: float
    acted: Mapping[str, int]
    """Component → questions in which it had a say."""
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)

    @property
    def row_is_star_kv(self) -> bool:
        """Whether the row has components that may act."""
        return self.row.startswith(("star_kv", "native"))


def figures_of(suite: str, records: Sequence[TableRecord], task: str = ALL) -> list[Figure]:
    """Figures of a suite or of one of its tasks.

    Args:
        suite: its name.
        records: of one or several runs that asked the same questions.
        task: only questions of this one.
    """
    cells: dict[Key, dict[str, tuple[TableRecord, Cell]]] = {}
    for record in records:
        if task in (ALL, record.task):
            for row, by_budget in record.cells.items():
                for budget, cell in by_budget.items():
                    cells.setdefault((row, float(budget)), {})[record.id] = (record, cell)
    comparisons = _compare(cells)
    return [
        _figure(suite, task, key, list(answers.values()), comparisons.get(key, {}))
        for key, answers in cells.items()
    ]


def _figure(
    suite: str,
    task: str,
    key: Key,
    answers: list[tuple[TableRecord, Cell]],
    comparisons: Mapping[str, Comparison],
) -> Figure:
    hits, count = sum(cell.hit for _, cell in answers), len(answers)
    low, high = wilson_interval(hits, count)
    clicks = [
        (cell.distance, float(np.hypot(*record.size)))
        for record, cell in answers
        if cell.distance is not None
    ]
    held = sum(cell.bytes for _, cell in answers)
    return Figure(
        suite=suite,
        task=task,
        row=key[0],
        budget=key[1],
        questions=count,
        hits=hits,
        accuracy=hits / count,
        low=low,
        high=high,
        clicks=len(clicks),
        distance=float(np.mean([pixels for pixels, _ in clicks])) if clicks else None,
        distance_share=float(np.mean([pixels / most for pixels, most in clicks])) if clicks else None,
        rows_share=sum(cell.rows for _, cell in answers) / sum(record.prompt_rows for record, _ in answers),
        bytes_share=held / sum(record.full_bytes for record, _ in answers),
        bytes_mean=held / count,
        acted=Counter(name for _, cell in answers for name in cell.acted),
        comparisons=comparisons,
    )


def baselines_of(rows: Sequence[str]) -> list[str]:
    """What rows are compared with: ablations also with what they are ablations of."""
    extra = [NATIVE] if any(row.startswith("native") for row in rows) else []
    return [name for name in (*BASELINES, *extra) if name in rows]


def _compare(
    cells: Mapping[Key, Mapping[str, tuple[TableRecord, Cell]]],
) -> dict[Key, dict[str, Comparison]]:
    found: dict[Key, dict[str, Comparison]] = {key: {} for key in cells}
    for baseline in baselines_of([row for row, _ in cells]):
        pairs = []
        for row, budget in cells:
            other = (baseline, 1.0 if baseline == FULL else budget)
            if row != baseline and other in cells:
                ids = tuple(name for name in cells[row, budget] if name in cells[other])
                if ids:
                    pairs.append(((row, budget), other, ids))
        splits = [
            Discordance.of([cells[key][i][1].hit for i in ids], [cells[other][i][1].hit for i in ids])
            for key, other, ids in pairs
        ]
        adjusted = holm([split.p_value for split in splits])
        intervals = _intervals(cells, pairs)
        for (key, _, ids), split, p_adjusted, (low, high) in zip(
            pairs, splits, adjusted, intervals, strict=True
        ):
            found[key][baseline] = Comparison(
                baseline=baseline,
                questions=len(ids),
                difference=(split.only_first - split.only_second) / len(ids),
                low=low,
                high=high,
                discordance=split,
                p_value=split.p_value,
                p_adjusted=p_adjusted,
            )
    return found


def _intervals(
    cells: Mapping[Key, Mapping[str, tuple[TableRecord, Cell]]],
    pairs: Sequence[tuple[Key, Key, tuple[str, ...]]],
) -> list[tuple[float, float]]:
    """Bounds of each pair's difference. Pairs on the same questions share their resampling, which is most of
    the work."""
    bounds: dict[int, tuple[float, float]] = {}
    for asked in dict.fromkeys(ids for _, _, ids in pairs):
        members = [number for number, (_, _, ids) in enumerate(pairs) if ids == asked]
        differences = np.array(
            [
                [float(cells[key][i][1].hit) - float(cells[other][i][1].hit) for i in asked]
                for key, other, _ in (pairs[number] for number in members)
            ]
        )
        groups = [cells[pairs[members[0]][0]][i][0].group for i in asked]
        for number, (low, high) in zip(members, cluster_intervals(differences, groups), strict=True):
            bounds[number] = (float(low), float(high))
    return [bounds[number] for number in range(len(pairs))]
