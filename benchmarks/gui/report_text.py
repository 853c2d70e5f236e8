# SPDX-License-Identifier: Apache-2.0
"""The report's words and tables."""

from collections.abc import Callable, Sequence
from functools import partial

from cells import TableRecord, TableSettings
from components import COMPONENTS, LABELS
from figures import ALL, Figure

from starkv.methods.names import FULL
from starkv.validation.report import markdown_table

_STAR = "\\*"


def suite_sections(
    suite: str, settings: TableSettings, records: Sequence[TableRecord], figures: Sequence[Figure]
) -> str:
    """Everything about one suite.

    Args:
        suite: its name.
        settings: of the engine's run.
        records: all of them.
        figures: of the suite and of its tasks.
    """
    whole = [figure for figure in figures if figure.task == ALL]
    tasks = [task for task in dict.fromkeys(figure.task for figure in figures) if task != ALL]
    questions = {record.id: record for record in records}.values()
    groups = len({record.group for record in questions})
    prompts = sorted(record.prompt_rows for record in questions)
    parts = [
        f"## {suite}\n",
        f"{len(questions)} questions of {groups} {'screens' if suite == 'click' else 'episodes'}, prompts of "
        f"{prompts[0]} to {prompts[-1]} rows. The full cache: {_full(whole)}.\n",
        f"![Accuracy by budget](plots/{suite}-budget.png)\n",
        f"![Accuracy by bytes held](plots/{suite}-bytes.png)\n",
        "### Accuracy\n",
        _by_budget(whole, _accuracy, _acted_column(whole)),
        "",
    ]
    for baseline in dict.fromkeys(name for figure in whole for name in figure.comparisons):
        parts += [
            f"### Difference to {baseline}, points\n",
            _by_budget(
                [figure for figure in whole if baseline in figure.comparisons],
                partial(_difference, baseline),
            ),
            "",
        ]
    parts += [
        "### Distance from the middle of the box\n",
        "Mean pixels, share of the screen's diagonal; where some replies were no click, the share that was: "
        "distances are about those alone.\n",
        _by_budget(whole, _distance),
        "",
        "### Bytes held before the reply, share of the full cache's\n",
        _by_budget(whole, lambda figure: f"{figure.bytes_share:.1%}"),
        "",
        "### By task\n",
        f"![Accuracy by budget and task](plots/{suite}-tasks.png)\n",
    ]
    for task in tasks:
        of_task = [figure for figure in figures if figure.task == task]
        count = max(figure.questions for figure in of_task)
        parts += [f"#### {task}\n", f"{count} questions; the full cache: {_full(of_task)}.\n"]
        parts += [_by_budget(of_task, _accuracy), ""]
    return "\n".join(parts) + "\n"


def _by_budget(
    figures: Sequence[Figure],
    text: Callable[[Figure], str],
    column: tuple[str, dict[str, str]] | None = None,
) -> str:
    """A table with a line per row and a column per budget; the full cache stands in the text above."""
    shown = [figure for figure in figures if figure.row != FULL]
    budgets = sorted({figure.budget for figure in shown})
    cells = {(figure.row, figure.budget): text(figure) for figure in shown}
    names = list(dict.fromkeys(figure.row for figure in shown))
    most = max((figure.questions for figure in shown), default=0)
    header = ["method", *(f"{budget:.0%}" for budget in budgets), *([column[0]] if column else [])]
    lines = []
    for name in names:
        count = max(figure.questions for figure in shown if figure.row == name)
        label = name if count == most else f"{name}, n = {count}"
        line = [label, *(cells.get((name, budget), "") for budget in budgets)]
        lines.append(line + ([column[1].get(name, "")] if column else []))
    return markdown_table(header, lines)


def _accuracy(figure: Figure) -> str:
    return f"{100 * figure.accuracy:.1f} ({100 * figure.low:.1f}–{100 * figure.high:.1f})"


def _full(figures: Sequence[Figure]) -> str:
    found = [figure for figure in figures if figure.row == FULL]
    return f"{_accuracy(found[0])} %, {_distance(found[0])}" if found else "not asked"


def _difference(baseline: str, figure: Figure) -> str:
    compared = figure.comparisons[baseline]
    stars = sum(compared.p_adjusted < limit for limit in (0.05, 0.01, 0.001))
    bounds = f"{100 * compared.low:+.1f} to {100 * compared.high:+.1f}"
    # Markdown would take plain stars for emphasis.
    return f"{100 * compared.difference:+.1f}{stars * _STAR} ({bounds})"


def _distance(figure: Figure) -> str:
    if figure.distance is None or figure.distance_share is None:
        return "no clicks"
    missing = "" if figure.clicks == figure.questions else f", {figure.clicks / figure.questions:.0%} click"
    return f"{figure.distance:.1f} px ({figure.distance_share:.1%}){missing}"


def _acted_column(figures: Sequence[Figure]) -> tuple[str, dict[str, str]] | None:
    """In how many questions each part of STaR-KV had a say; a range where it differs between budgets."""
    texts = {}
    for name in dict.fromkeys(figure.row for figure in figures if figure.row_is_star_kv):
        of_row = [figure for figure in figures if figure.row == name]
        parts = []
        for component in COMPONENTS:
            counts = sorted({figure.acted.get(component, 0) for figure in of_row})
            seen = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
            parts.append(f"{LABELS[component]} {seen}")
        texts[name] = f"{'; '.join(parts)} of {of_row[0].questions}"
    return ("parts of STaR-KV that acted, questions", texts) if texts else None
