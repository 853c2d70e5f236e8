# SPDX-License-Identifier: Apache-2.0
"""Scores along the prompt and on the screenshots, for the picture of ``starkv inspect --kept``."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.cli.kept_style import (
    BAND,
    BLUE,
    CAPTION,
    GREY,
    INK,
    MARGIN,
    MUTED,
    ORANGE,
    PAPER,
    SKY,
    Sheet,
)
from starkv.runtime.kv.kept import STAGES, Kept, stage_changes

Floats = NDArray[np.float32]

_SIGNS = ("", "+ ", "× ", "× ")
_COLORS = (GREY, SKY, ORANGE, BLUE)
_NAMES, _PLOT, _STRIP, _AXIS = 0.16, 1.5, 0.2, 0.6
"""Inches of the curves' names, the curves, the kept rows, and their numbers."""
_WIDE_RANGE = 25.0
"""Highest score over the median from which a logarithmic axis shows more."""
_DENSE = 600
"""Rows from which lines are thin."""


def acting_stages(kept: Kept) -> list[str]:
    """Stages that changed a score, the first one included."""
    changes = stage_changes(kept.scores)
    return [name for name in kept.scores if changes.get(name, 1.0) > 0.0]


def height_of_scores(kept: Kept) -> float:
    """Inches that :func:`draw_scores` takes."""
    return CAPTION + _STRIP + _AXIS + (_NAMES + _PLOT + 0.08 if kept.scores else 0.0)


def draw_scores(sheet: Sheet, kept: Kept, top: float) -> None:
    """Scores of all rows of the prompt, and below them which rows were kept."""
    left, width = MARGIN + 0.42, sheet.width - 2 * MARGIN - 0.42
    if kept.scores:
        sheet.heading(MARGIN, top + 0.2, "Scores along the prompt", _remark(kept))
        top += CAPTION + _NAMES
        axes = sheet.axes(left, top, width, _PLOT)
        _bands(axes, kept)
        _curves(axes, kept)
        top += _PLOT + 0.08
    else:
        sheet.heading(MARGIN, top + 0.2, "Rows of the prompt", "kept without looking at scores")
        top += CAPTION
    strip = sheet.picture(left, top, width, _STRIP)
    _strip(strip, kept)
    strip.set_ylabel("kept", rotation=0, ha="right", va="center")
    strip.xaxis.set_major_locator(_whole_numbers())
    bottom = top + _STRIP + 0.37
    sheet.text(left + width / 2, bottom, "row of the prompt", size=8.5, color=MUTED, ha="center")
    if kept.always.any():
        end = left
        for color, name in ((BLUE, "by score"), (ORANGE, "in any case")):
            sheet.text(end, bottom, "■", size=9, color=color)
            end = sheet.text(end + 0.14, bottom, name, size=8, color=MUTED) + 0.16


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=10, integer=True)


def stage_name(stage: str) -> str:
    """A stage's name in words."""
    words = {"hidden_norm_boost": "hidden-norm boost"}
    return words.get(stage, stage.replace("_", " "))


def stage_label(stage: str) -> str:
    """A stage's name, with what it does to the one before."""
    return _SIGNS[STAGES.index(stage)] + stage_name(stage) if stage in STAGES else stage


def _remark(kept: Kept) -> str:
    """What the curves are, and which stages they leave out."""
    shown = f"mean over {len(kept.layers)} layers" if len(kept.layers) > 1 else f"layer {kept.layers[0]}"
    acting = acting_stages(kept)
    idle = [stage_name(name) for name in kept.scores if name not in acting]
    return f"{shown}; {' and '.join(idle)} did nothing here" if idle else shown


def _bands(axes: Any, kept: Kept) -> None:
    """Where the screenshots are."""
    for index, (start, end) in enumerate(kept.prompt.spans):
        axes.axvspan(start, end, color=BAND, lw=0, zorder=0)
        share = (end - start) / kept.prompt.length
        name = f"screenshot {index + 1}" if share > 0.09 else str(index + 1)
        if len(kept.prompt.spans) == 1:
            name = "screenshot"
        if share > 0.02:
            middle = (start + end) / 2, 0.95
            where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
            axes.text(*middle, name, size=8, color=MUTED, **where)


def _curves(axes: Any, kept: Kept) -> None:
    names = acting_stages(kept)
    curves = {name: kept.scores[name].mean(axis=0) for name in names}
    positive = np.concatenate([values[values > 0] for values in curves.values()] or [np.ones(1)])
    wide = bool(positive.size) and positive.max() > _WIDE_RANGE * np.median(positive)
    floor = max(float(positive.min()), float(positive.max()) * 1e-6) if wide else 0.0
    edges = np.arange(kept.prompt.length + 1)
    thin = 0.6 if kept.prompt.length > _DENSE else 1.0
    for name, values in curves.items():
        final = name == names[-1]
        color = BLUE if final else _COLORS[STAGES.index(name)]
        levels = np.maximum(values, floor)
        if final:
            axes.stairs(levels, edges, baseline=floor, fill=True, color=color, alpha=0.15, lw=0)
        axes.stairs(
            levels,
            edges,
            baseline=None,
            color=color,
            lw=1.3 * thin if final else thin,
            label=stage_label(name),
        )
    if kept.cut is not None and len(kept.layers) == 1 and np.isfinite(kept.cut[0]):
        axes.axhline(float(kept.cut[0]), color=INK, lw=0.8, ls=(0, (4, 3)), label="highest dropped")
    axes.set_xlim(0, kept.prompt.length)
    if wide:
        axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_ylabel("score", labelpad=3)
    axes.tick_params(labelbottom=False, bottom=False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(
            frameon=False, fontsize=8, loc="lower left", ncols=5, bbox_to_anchor=(-0.008, 0.99), borderpad=0
        )


def _strip(axes: Any, kept: Kept) -> None:
    """Share of layers that kept each row; in another colour those that had to be."""
    from matplotlib.colors import to_rgb

    share = kept.share.mean(axis=0)[:, None]
    ink = np.where(kept.always[:, None], to_rgb(ORANGE), to_rgb(BLUE))
    colors = share * ink + (1.0 - share) * np.array(to_rgb(PAPER))
    axes.imshow(colors[None], extent=(0, kept.prompt.length, 0, 1), aspect="auto")


def draw_stage(axes: Any, kept: Kept, index: int, stage: str) -> None:
    """Scores after a stage on a screenshot, the kept tokens outlined; all stages on the same scale."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("scores", [PAPER, SKY, BLUE, "#00263d"])
    values = {name: kept.screenshot(index, kept.scores[name])[0] for name in acting_stages(kept)}
    rows, columns = kept.prompt.grids[index]
    highest = max(float(scores.max()) for scores in values.values()) or 1.0
    axes.imshow(values[stage], extent=(0, columns, rows, 0), aspect="auto", cmap=colors, vmin=0, vmax=highest)
    lines = outlines(kept.screenshot(index, kept.share)[0] > 0)
    axes.add_collection(LineCollection(list(lines), colors=ORANGE, linewidths=1.2, clip_on=False))


def outlines(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Edges between marked and other cells of a grid ``[rows, columns]``, as lines ``[n, 2, 2]`` from x, y to
    x, y."""
    padded = np.pad(mask, 1)
    lines = []
    for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        lines.append(((x, y), (x + 1, y)))
    for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        lines.append(((x, y), (x, y + 1)))
    return np.array(lines, np.float64).reshape(-1, 2, 2)
