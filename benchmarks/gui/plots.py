# SPDX-License-Identifier: Apache-2.0
"""Plots of the table: accuracy by budget, by bytes held, and by task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from figures import ALL, Figure
from rows import FAST_RAMP, NATIVE, OFFICIAL, ORACLE

from starkv.methods.names import FULL

INK, MUTED = "#222222", "#8a8a8a"
_LEAST_GAP = 0.046
"""Between two labels, as share of the plot's height."""


@dataclass(frozen=True)
class Style:
    """How a row is drawn: no two share both colour and dashes, so that colour is never all that tells."""

    color: str
    dashes: str = "-"
    width: float = 1.5
    marker: str = "o"


# Okabe and Ito's colours, which colour-blind readers can tell apart.
_STYLES = {
    NATIVE: Style("#D55E00", width=2.6),
    OFFICIAL: Style("#0072B2", width=2.2, marker="s"),
    FAST_RAMP: Style("#56B4E9", "--", 1.8, "s"),
    "snapkv": Style("#009E73", marker="^"),
    "pyramidkv": Style("#CC79A7", marker="v"),
    "gui_kv": Style("#E69F00", marker="D"),
    "streaming_llm": Style("#6b4c2a", "-.", marker="P"),
    "random": Style(MUTED, ":", marker="x"),
    ORACLE: Style(INK, "--", 1.2, "*"),
}
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b4c2a", "#332288", "#882255", "#44AA99")
_OTHER_DASHES = ("--", "-.", ":")
_OTHER_MARKERS = ("^", "v", "D", "P", "x", "<", ">")


def styles_of(rows: Sequence[str]) -> dict[str, Style]:
    """A style for each row."""
    styles, others = {}, 0
    for row in rows:
        if row in _STYLES:
            styles[row] = _STYLES[row]
        elif row != FULL:
            styles[row] = Style(
                _OTHERS[others % len(_OTHERS)],
                _OTHER_DASHES[others % len(_OTHER_DASHES)],
                marker=_OTHER_MARKERS[others % len(_OTHER_MARKERS)],
            )
            others += 1
    return styles


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights of labels as near to the wanted ones as it gets, at least ``gap`` apart, in their order.

    Args:
        heights: wanted.
        gap: least distance; smaller where there is no room for it.
        low: least height.
        high: greatest.
    """
    if not heights:
        return []
    gap = min(gap, (high - low) / max(1, len(heights) - 1))
    order = np.argsort(heights, kind="stable")
    # Without the gaps, labels only have to keep their order: the nearest such heights are pooled means.
    wanted = np.asarray(heights, float)[order] - gap * np.arange(len(heights))
    blocks: list[list[float]] = []
    for height in wanted:
        blocks.append([height])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    flat = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])
    placed = np.clip(flat, low, high - gap * (len(heights) - 1)) + gap * np.arange(len(heights))
    result = np.empty(len(heights))
    result[order] = placed
    return [float(height) for height in result]


def draw(folder: Path, suite: str, figures: Sequence[Figure]) -> None:
    """Draw all plots of a suite: ``{suite}-budget.png``, ``-bytes.png`` and ``-tasks.png``."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    whole = [figure for figure in figures if figure.task == ALL]
    tasks = [task for task in dict.fromkeys(figure.task for figure in figures) if task != ALL]
    single: list[tuple[str, str, Callable[[Figure], float]]] = [
        ("budget", "KV budget, share of the prompt's rows", lambda figure: figure.budget),
        ("bytes", "bytes held, share of the full cache's", lambda figure: figure.bytes_share),
    ]
    with pyplot.rc_context({"font.size": 10, "axes.edgecolor": MUTED, "text.color": INK}):
        for name, label, place in single:
            sheet, axes = pyplot.subplots(figsize=(8.6, 5.2), layout="constrained")
            _panel(axes, whole, place, label, f"{suite}: clicks inside the box{_shaded(whole)}")
            _save(sheet, folder / f"{suite}-{name}.png")
        across = min(2, len(tasks))
        down = -(-len(tasks) // across)
        sheet, grid = pyplot.subplots(
            down, across, figsize=(8.2 * across, 4.6 * down), layout="constrained", squeeze=False, sharey=True
        )
        for axes, task in zip(grid.flat, tasks, strict=False):
            some = [figure for figure in figures if figure.task == task]
            count = max(figure.questions for figure in some)
            _panel(axes, some, single[0][2], single[0][1], f"{task} ({count} questions)")
        for axes in list(grid.flat)[len(tasks) :]:
            axes.remove()
        _save(sheet, folder / f"{suite}-tasks.png")


def _shaded(figures: Sequence[Figure]) -> str:
    return f" (shaded: 95 % interval of {NATIVE})" if any(figure.row == NATIVE for figure in figures) else ""


def _panel(
    axes: Any, figures: Sequence[Figure], place: Callable[[Figure], float], label: str, title: str
) -> None:
    rows = list(dict.fromkeys(figure.row for figure in figures))
    styles = styles_of(rows)
    ends = []
    for row, style in styles.items():
        of_row = sorted((figure for figure in figures if figure.row == row), key=place)
        x = [place(figure) for figure in of_row]
        y = [100 * figure.accuracy for figure in of_row]
        front = 4 if row.startswith("star_kv") else 3
        axes.plot(
            x, y, style.dashes, color=style.color, lw=style.width, marker=style.marker, ms=5, zorder=front
        )
        if row == NATIVE:
            low, high = ([100 * getattr(figure, name) for figure in of_row] for name in ("low", "high"))
            axes.fill_between(x, low, high, color=style.color, alpha=0.15, lw=0)
        ends.append((row, x[-1], y[-1]))
    full = [100 * figure.accuracy for figure in figures if figure.row == FULL]
    if full:
        axes.axhline(full[0], color=MUTED, lw=1, zorder=1)
    shown = sorted({figure.budget for figure in figures if figure.row != FULL})
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [f"{budget:.0%}" for budget in shown], minor=False)
    axes.minorticks_off()
    axes.set_ylim(-2, 102)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ends, styles, full[0] if full else None)


def _label(
    axes: Any, ends: Sequence[tuple[str, float, float]], styles: dict[str, Style], full: float | None
) -> None:
    """Names beside the ends of the lines, moved apart, with a thin line to what they name."""
    names = [*ends, *([(FULL, max((x for _, x, _ in ends), default=1.0), full)] if full is not None else [])]
    low, high = axes.get_ylim()
    span = high - low
    wanted = [(y - low) / span for _, _, y in names]
    right = max((x for _, x, _ in names), default=1.0)
    for (row, x, y), height in zip(names, spread(wanted, _LEAST_GAP, 0.01, 0.99), strict=True):
        color = styles[row].color if row in styles else MUTED
        axes.annotate(
            row,
            xy=(right if row == FULL else x, y),
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            color=color,
            fontweight="bold" if row.startswith("star_kv") else "normal",
            fontsize=9,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "lw": 0.6,
                "alpha": 0.6,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _save(sheet: Any, path: Path) -> None:
    from matplotlib import pyplot

    sheet.savefig(path, dpi=140)
    pyplot.close(sheet)
