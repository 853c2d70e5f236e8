# SPDX-License-Identifier: Apache-2.0
"""Plot of packed caches: accuracy by bytes held, with the Pareto front."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from packed_figures import PackedFigure
from packings import EVICTED, LABELS
from plots import INK, MUTED

from starkv.methods.names import FULL

# Okabe and Ito's colours by rank, shapes by quantization: no two packings share both.
_COLORS = {"": "#0072B2", "r100": "#009E73", "r75": "#E69F00", "r50": "#CC79A7"}
_MARKERS = {"": "o", "int8": "s", "int4": "^"}
_FRONT = "#D55E00"


def draw_front(path: Path, suite: str, figures: Sequence[PackedFigure]) -> None:
    """Draw all packings of a suite, a line each from no eviction to the smallest budget."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"font.size": 10, "axes.edgecolor": MUTED, "text.color": INK}):
        sheet, axes = pyplot.subplots(figsize=(11, 6.2), layout="constrained")
        _draw(axes, suite, figures)
        sheet.legend(loc="outside right upper", frameon=False, fontsize=9)
        sheet.savefig(path, dpi=140)
        pyplot.close(sheet)


def _style(packing: str) -> tuple[str, str]:
    """Colour and marker."""
    if packing == EVICTED:
        return INK, "o"
    parts = packing.split("-")
    rank = parts[0] if parts[0].startswith("r") else ""
    quant = parts[-1] if parts[-1].startswith("int") else ""
    return _COLORS[rank], _MARKERS[quant]


def _draw(axes: Any, suite: str, figures: Sequence[PackedFigure]) -> None:
    whole = next(figure.plain for figure in figures if figure.plain.row == FULL)
    axes.axhspan(100 * whole.low, 100 * whole.high, color="#eeeeee", zorder=0)
    for packing in (name for name in LABELS if any(figure.packing == name for figure in figures)):
        line = sorted(
            (figure for figure in figures if figure.packing == packing), key=lambda one: one.plain.budget
        )
        color, marker = _style(packing)
        x = [one.plain.bytes_mean / 1024 for one in line]
        y = [100 * one.plain.accuracy for one in line]
        axes.plot(x, y, color=color, lw=0.8, alpha=0.6, zorder=2)
        axes.plot(x, y, marker, color=color, ms=6, mec="white", mew=0.6, zorder=4, label=LABELS[packing])
    front = sorted((one for one in figures if one.on_front), key=lambda one: one.plain.bytes_mean)
    edge = [one.plain.bytes_mean / 1024 for one in front]
    accuracy = [100 * one.plain.accuracy for one in front]
    axes.step(edge, accuracy, where="post", color=_FRONT, lw=2, alpha=0.7, zorder=3, label="Pareto front")
    axes.set_xscale("log", base=2)
    ticks = 2.0 ** np.arange(np.floor(np.log2(min(edge))), np.ceil(np.log2(whole.bytes_mean / 1024)) + 1)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], minor=False)
    axes.minorticks_off()
    lowest = min(100 * one.plain.accuracy for one in figures)
    highest = max(100 * one.plain.accuracy for one in figures)
    axes.set_ylim(lowest - 3, highest + 3)
    axes.set_xlabel(
        "KiB of the KV cache held per question; each line goes from all rows (right) to the smallest budget"
    )
    axes.set_ylabel("clicks inside the box, %")
    axes.set_title(
        f"{suite}, {whole.questions} questions (grey: 95 % interval of the whole float cache)",
        loc="left",
        fontsize=11,
        fontweight="bold",
    )
    axes.grid(color="#ececec", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    _number_front(axes, front)


def _number_front(axes: Any, front: Sequence[PackedFigure]) -> None:
    """Numbers above the front's points, which the legend explains: names would lie over other points."""
    for number, one in enumerate(front, 1):
        accuracy = 100 * one.plain.accuracy
        axes.annotate(
            str(number),
            xy=(one.plain.bytes_mean / 1024, accuracy),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=_FRONT,
            fontweight="bold",
        )
        label = f"{LABELS[one.packing]}, {one.plain.budget:.0%} of the rows"
        axes.plot([], [], linestyle="", marker=f"${number}$", color=_FRONT, label=label)
