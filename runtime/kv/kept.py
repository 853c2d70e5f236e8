# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt a compression kept: the numbers behind ``starkv inspect --kept``.

Symbols: L layers, N index sets of a layer (1, or its KV heads), S rows of the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.methods.budget import window_rows
from starkv.methods.names import FULL, RANDOM, STAR_KV, STREAMING_LLM
from starkv.methods.rows import ROW_FRAME, TEXT_FRAME, PromptRows
from starkv.runtime.kv.baselines import WINDOW
from starkv.runtime.kv.policy import Compressed, KvPolicy

Floats = NDArray[np.float32]

STAGES = ("window_attention", "hidden_norm_boost", "spatial_prior", "temporal_discount")
"""What STaR-KV's ``stages`` are the scores after."""
_NO_SCORES = (STREAMING_LLM, RANDOM)
"""Methods whose scores only say what they keep."""
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Kept:
    """What a compression kept of a prompt, and the scores it went by."""

    mask: NDArray[np.bool_]
    """``[L, N, S]``."""
    prompt: PromptRows
    layers: tuple[int, ...]
    """``[L]`` their numbers in the model."""
    scores: Mapping[str, Floats]
    """Name of a stage → ``[L, S]``, means over a layer's heads; the last one decided. Empty for methods that
    have none."""
    always: NDArray[np.bool_]
    """``[S]``: rows that are kept whatever their score."""
    cut: Floats | None
    """``[L]`` highest score of a dropped row: kept rows with less are kept whatever their score. None where
    there are no scores, or a layer has several index sets."""

    @property
    def share(self) -> Floats:
        """``[L, S]``: share of a layer's index sets that kept each row."""
        share: Floats = self.mask.mean(axis=1, dtype=np.float32)
        return share

    def screenshot(self, index: int, values: Floats) -> Floats:
        """The part of ``values [L, S]`` on a screenshot: ``[L, rows, columns]`` of its tokens."""
        start, end = self.prompt.spans[index]
        return values[:, start:end].reshape(len(values), *self.prompt.grids[index])

    @property
    def screenshots(self) -> list["Part"]:
        """What was kept of each screenshot."""
        return [Part(self.share[:, start:end]) for start, end in self.prompt.spans]

    @property
    def text(self) -> "Part":
        """What was kept of the rows that belong to no screenshot."""
        return Part(self.share[:, self.prompt.row_meta[:, ROW_FRAME] == TEXT_FRAME])


@dataclass(frozen=True)
class Part:
    """What was kept of a part of the prompt."""

    shares: Floats
    """``[L, tokens]``: share of a layer's index sets that kept each token."""

    @property
    def tokens(self) -> int:
        return int(self.shares.shape[1])

    @property
    def kept(self) -> float:
        """Tokens kept, mean over the layers."""
        return float(self.shares.sum(axis=-1).mean())

    @property
    def share(self) -> float:
        return self.kept / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, object]:
        """Tokens, and how many of them were kept: on average and in each layer."""
        return {
            "tokens": self.tokens,
            "kept": round(self.kept, 4),
            "share": round(self.share, 4),
            "kept_per_layer": np.round(self.shares.sum(axis=-1), 4).tolist(),
        }


def kept_tokens(
    compressed: Compressed,
    prompt: PromptRows,
    policy: KvPolicy,
    layer: int | None = None,
    head: int | None = None,
) -> Kept:
    """Read a compression's outcome.

    Args:
        compressed: the outcome.
        prompt: the rows that were compressed.
        policy: what it was compressed by.
        layer: only this layer; all by default.
        head: only this KV head's index sets; all by default.

    Raises:
        UsageError: there is no such layer, or its rows are not chosen head by head.
    """
    layers, sets, _ = compressed.rows.shape
    check_layer(layer, layers)
    if head is not None and sets == 1:
        raise UsageError(f"{policy.method} keeps the same rows for all heads of a layer; leave --head out")
    check_head(head, sets)
    mask = row_mask(compressed.rows, prompt.length)
    scores: dict[str, NDArray[np.float32]] = {}
    if compressed.stages is not None:
        scores = {name: compressed.stages[:, index] for index, name in enumerate(STAGES)}
    elif compressed.scores is not None and policy.method not in _NO_SCORES:
        of_head = compressed.scores if head is None else compressed.scores[:, [head]]
        scores = {"score": of_head.mean(axis=1, dtype=np.float32)}
    if head is not None:
        mask = mask[:, [head]]
    cut = None
    if scores and mask.shape[1] == 1:
        last = list(scores.values())[-1]
        cut = np.where(mask[:, 0], -np.inf, last).max(axis=-1).astype(np.float32)
    kept = Kept(mask, prompt, tuple(range(layers)), scores, always_kept(prompt, policy), cut)
    if layer is None:
        return kept
    one = slice(layer, layer + 1)
    return replace(
        kept,
        mask=mask[one],
        layers=(layer,),
        scores={name: values[one] for name, values in scores.items()},
        cut=None if cut is None else cut[one],
    )


def check_layer(layer: int | None, layers: int) -> None:
    """Refuse a layer that a model doesn't have.

    Raises:
        UsageError: ``layer`` is none of the ``layers``.
    """
    if layer is not None and not 0 <= layer < layers:
        raise UsageError(f"there is no layer {layer}; this model has layers 0 to {layers - 1}")


def check_head(head: int | None, heads: int) -> None:
    """Refuse a KV head that a model doesn't have.

    Raises:
        UsageError: ``head`` is none of the ``heads``.
    """
    if head is not None and not 0 <= head < heads:
        raise UsageError(f"there is no KV head {head}; this model has KV heads 0 to {heads - 1}")


def row_mask(rows: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
    """Kept rows as a mask ``[L, N, length]``.

    Args:
        rows: ``[L, N, K]`` row numbers, −1 for none.
        length: rows of the prompt.
    """
    mask = np.zeros((*rows.shape[:2], length + 1), np.bool_)
    # −1 is the last column, which nothing else uses.
    np.put_along_axis(mask, rows, True, axis=-1)
    return mask[..., :length]


def stage_changes(scores: Mapping[str, Floats]) -> dict[str, float]:
    """How far each of STaR-KV's stages moved any row's score: the largest difference to the stage before,
    relative to the layer's highest score before it. 0.0 for a stage that did nothing, empty without stages.
    """
    changes = {}
    for before, after in pairwise(scores):
        highest = np.abs(scores[before]).max(axis=-1)
        moved = np.abs(scores[after] - scores[before]).max(axis=-1)
        relative = float((moved / np.where(highest > 0.0, highest, 1.0)).max())
        changes[after] = relative if relative > _ROUNDING else 0.0
    return changes


def always_kept(prompt: PromptRows, policy: KvPolicy) -> NDArray[np.bool_]:
    """Rows ``[S]`` that a policy keeps whatever their score: its window, and what STaR-KV protects."""
    always = np.zeros(prompt.length, np.bool_)
    kept = policy.kept_rows(prompt.length)
    if policy.method == FULL or policy.method in _NO_SCORES or policy.budget.spares(prompt.length):
        return always
    star_kv = policy.method == STAR_KV
    window = policy.star_kv.window_for(kept) if star_kv else window_rows(WINDOW, kept)
    always[prompt.length - window :] = True
    if star_kv and policy.star_kv.protect_rows:
        always[list(prompt.protected(kept, window))] = True
    return always


def kept_json(kept: Kept) -> dict[str, object]:
    """The numbers as JSON values: of each screenshot and of the text, how many tokens each layer kept."""
    screenshots = []
    for index, part in enumerate(kept.screenshots):
        in_layers = kept.screenshot(index, kept.share).sum(axis=0)
        screenshots.append(
            {
                "first_row": kept.prompt.spans[index][0],
                "grid": list(kept.prompt.grids[index]),
                **part.to_json(),
                "kept_in_layers": np.round(in_layers, 4).tolist(),
            }
        )
    stages = {
        name: {"acted": change > 0.0, "largest_change": round(change, 6)}
        for name, change in stage_changes(kept.scores).items()
    }
    return {
        "layers": list(kept.layers),
        "index_sets_per_layer": kept.mask.shape[1],
        "rows_per_layer": np.round(kept.share.sum(axis=-1), 4).tolist(),
        "always_kept_rows": int(kept.always.sum()),
        "screenshots": screenshots,
        "text": kept.text.to_json(),
        "stages": stages,
    }
