# SPDX-License-Identifier: Apache-2.0
"""Report, table and plots of packed caches from the records alone.

python benchmarks/gui/packed_report.py runs/kv-packing
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from packed_figures import PackedFigure, packed_figures
from packed_plots import draw_front
from packings import LABELS, PackedRecord, PackedSettings
from pydantic import ValidationError
from running import SUITES
from suite_run import plain_parser, run_command

from starkv.errors import UsageError
from starkv.evaluation.records import RECORDS_FILE, SETTINGS_FILE, read_records
from starkv.validation.report import installed_versions, markdown_table, write_text

_STAR = "\\*"
_COLUMNS = ("suite", "task", "packing", "budget", "questions", "hits", "accuracy", "low", "high")
_COLUMNS += ("bytes_mean", "bytes_share", "rows_share", "same", "kl_mean", "kl_p95", "on_front", "distance")
_COLUMNS += ("difference", "difference_low", "difference_high", "p_adjusted")
_COLUMNS += ("added", "added_low", "added_high")


def write_report(directory: Path) -> None:
    """Write ``report.md``, ``table.csv``, ``figures.json`` and ``plots/`` beside the records.

    Raises:
        UsageError: there are no records, or one can't be read.
    """
    lines: list[dict[str, object]] = []
    sections, known = [], {}
    for suite in SUITES:
        place = directory / suite
        if not (place / SETTINGS_FILE).is_file():
            continue
        try:
            settings = PackedSettings.model_validate_json((place / SETTINGS_FILE).read_bytes())
        except ValidationError as error:
            raise UsageError(f"{place / SETTINGS_FILE} can't be read: {error.errors()[0]['msg']}") from None
        records = list(read_records(place / RECORDS_FILE, PackedRecord))
        if not records:
            continue
        whole = packed_figures(suite, records)
        tasks = dict.fromkeys(record.task for record in records)
        every = [*whole, *(figure for task in tasks for figure in packed_figures(suite, records, task))]
        lines += [_line(figure) for figure in every]
        draw_front(directory / "plots" / f"{suite}.png", suite, whole)
        sections.append(_section(suite, records, whole))
        known[suite] = settings
    if not known:
        raise UsageError(f"{directory} holds no records of packed caches")
    settings = next(iter(known.values()))
    write_text(directory / "report.md", _heading(settings) + "\n".join(sections))
    write_text(directory / "table.csv", _csv(lines))
    figures = {
        "settings": {suite: one.model_dump() for suite, one in known.items()},
        "versions": installed_versions(),
        "figures": lines,
    }
    write_text(directory / "figures.json", json.dumps(figures, indent=1) + "\n")


def _line(figure: PackedFigure) -> dict[str, object]:
    plain, against = figure.plain, figure.against_full
    names = ("suite", "task", "budget", "questions", "hits", "accuracy", "low", "high", "bytes_mean")
    names += ("bytes_share", "rows_share", "distance")
    line: dict[str, object] = {name: getattr(plain, name) for name in names}
    line |= {"packing": figure.packing, "on_front": figure.on_front}
    line |= {"same": figure.same, "kl_mean": figure.kl_mean, "kl_p95": figure.kl_p95}
    if against is not None:
        line |= {"difference": against.difference, "p_adjusted": against.p_adjusted}
        line |= {"difference_low": against.low, "difference_high": against.high}
    if figure.added is not None:
        line |= {"added": figure.added.difference}
        line |= {"added_low": figure.added.low, "added_high": figure.added.high}
    return line


def _csv(lines: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for line in lines:
        values = (line.get(name) for name in _COLUMNS)
        cells = (f"{value:.6g}" if isinstance(value, float) else value for value in values)
        writer.writerow("" if value is None else value for value in cells)
    return text.getvalue()


def _heading(settings: PackedSettings) -> str:
    return (
        f"# Packed KV caches on synthetic GUI tasks: {settings.engine}\n\n"
        f"Split `{settings.split}`, seed {settings.seed}, engine `{settings.engine_hash[:12]}`, starkv "
        f"{settings.starkv}, greedy decoding, {settings.calibration_tokens} tokens of calibration "
        "(training split). All figures are in `table.csv` and `figures.json`.\n\n"
        "Columns are shares of the prompt's rows that STaR-KV (native) keeps; all packings get the same "
        "rows. A click is right inside the element's box; intervals are Wilson's, 95 %. Differences are to "
        "the whole float cache, in points, with a 95 % bootstrap interval over whole screens or episodes, "
        "and the exact McNemar test after Holm's adjustment over all cells (`*` p < 0.05, `**` p < 0.01, "
        "`***` p < 0.001), which takes questions for independent. Bytes are those that the caches hold "
        "before the reply, the newest 16 unpacked rows of low-rank caches, scales, padding and positions "
        "included. Divergences compare the distribution behind each token of the whole float cache's reply, "
        "that reply forced.\n\n"
    )


def _section(suite: str, records: Sequence[PackedRecord], figures: Sequence[PackedFigure]) -> str:
    prompts = sorted(record.prompt_rows for record in records)
    groups = len({record.group for record in records})
    front = sorted((figure for figure in figures if figure.on_front), key=lambda one: one.plain.bytes_mean)
    parts = [
        f"## {suite}\n",
        f"{len(records)} questions of {groups} {'screens' if suite == 'click' else 'episodes'}, prompts of "
        f"{prompts[0]} to {prompts[-1]} rows.\n",
        f"![Accuracy by bytes held](plots/{suite}.png)\n",
        "### The Pareto front\n",
        "By point estimates: neighbours on it may differ by chance, see the intervals.\n",
        markdown_table(
            (
                "packing",
                "rows",
                "KiB held",
                "times less than the whole float cache",
                "accuracy",
                "difference",
            ),
            [
                (
                    LABELS[one.packing],
                    f"{one.plain.budget:.0%}",
                    _kib(one),
                    f"{1 / one.plain.bytes_share:.1f}",
                    _accuracy(one),
                    _difference(one),
                )
                for one in front
            ],
        ),
        "",
    ]
    tables: Sequence[tuple[str, Callable[[PackedFigure], str]]] = (
        ("Accuracy, %", _accuracy),
        ("Difference to the whole float cache, points", _difference),
        ("What packing adds: difference to the same rows as floats, points", _added),
        ("KiB held (share of the whole float cache's)", _held),
        ("KL divergence in nats, mean / 95th percentile", _divergence),
        ("Replies equal to the whole float cache's", lambda one: f"{one.same:.0%}"),
    )
    for title, text in tables:
        parts += [f"### {title}\n", _by_budget(figures, text), ""]
    return "\n".join(parts) + "\n"


def _by_budget(figures: Sequence[PackedFigure], text: Callable[[PackedFigure], str]) -> str:
    budgets = sorted({figure.plain.budget for figure in figures}, reverse=True)
    cells = {(figure.packing, figure.plain.budget): text(figure) for figure in figures}
    packings = [name for name in LABELS if any(name == packing for packing, _ in cells)]
    return markdown_table(
        ["packing", *(f"{budget:.0%} of the rows" for budget in budgets)],
        [[LABELS[name], *(cells.get((name, budget), "") for budget in budgets)] for name in packings],
    )


def _accuracy(figure: PackedFigure) -> str:
    low, high = 100 * figure.plain.low, 100 * figure.plain.high
    return f"{100 * figure.plain.accuracy:.1f} ({low:.1f}–{high:.1f})"


def _difference(figure: PackedFigure) -> str:
    against = figure.against_full
    if against is None:
        return "0"
    stars = sum(against.p_adjusted < limit for limit in (0.05, 0.01, 0.001))
    # Markdown would take plain stars for emphasis.
    bounds = f"{100 * against.low:+.1f} to {100 * against.high:+.1f}"
    return f"{100 * against.difference:+.1f}{stars * _STAR} ({bounds})"


def _added(figure: PackedFigure) -> str:
    if figure.added is None:
        return ""
    bounds = f"{100 * figure.added.low:+.1f} to {100 * figure.added.high:+.1f}"
    return f"{100 * figure.added.difference:+.1f} ({bounds})"


def _kib(figure: PackedFigure) -> str:
    return f"{figure.plain.bytes_mean / 1024:,.0f}"


def _held(figure: PackedFigure) -> str:
    return f"{_kib(figure)} ({figure.plain.bytes_share:.1%})"


def _divergence(figure: PackedFigure) -> str:
    if figure.kl_mean is None or figure.kl_p95 is None:
        return "no tokens"
    return f"{figure.kl_mean:.4f} / {figure.kl_p95:.3f}"


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("directory", type=Path, help="--out of kv_packing.py")
    write_report(parser.parse_args().directory)


if __name__ == "__main__":
    run_command(main)
