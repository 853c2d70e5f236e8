# SPDX-License-Identifier: Apache-2.0
"""What calibration measures of one layer: moments for factors, query energies for metrics, peaks for scales.

A cache that has been compressed holds another mixture of tokens than the prompts of a calibration do: most
rows of a screenshot are gone. So visual and text tokens are counted apart and mixed by a weight.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import CalibrationError, UsageError
from starkv.lowrank.rotary import rotate


@dataclass(frozen=True)
class LayerStatistics:
    """Means over a layer's tokens. Keys and values are without their biases; moments are of keys as they are
    before rotation."""

    key_moments: NDArray[np.float64]
    """``[groups, width, width]``: E[y yᵀ] of each group of KV heads, width = heads per group · D."""
    value_moment: NDArray[np.float64]
    """``[KV heads · D, KV heads · D]``."""
    query_energies: NDArray[np.float64]
    """``[KV heads, D/2]``: E[q_i² + q_{i+D/2}²] / 2, mean over the query heads of each KV head."""
    key_peaks: NDArray[np.float64]
    """``[KV heads, D/2]``: largest magnitude of a rotated key in each rotary pair."""
    value_peaks: NDArray[np.float64]
    """``[KV heads, D]``: largest magnitude of each channel."""
    tokens: int

    @property
    def key_deviations(self) -> NDArray[np.float64]:
        """``[KV heads, D/2]``: root mean square over both channels of each rotary pair; rotation keeps it."""
        squares = np.diagonal(self.key_moments, axis1=1, axis2=2).reshape(len(self.key_peaks), 2, -1)
        deviations: NDArray[np.float64] = np.sqrt(squares.mean(axis=1))
        return deviations

    @property
    def value_deviations(self) -> NDArray[np.float64]:
        """``[KV heads, D]``: root mean square of each channel."""
        deviations: NDArray[np.float64] = np.sqrt(np.diagonal(self.value_moment))
        return deviations.reshape(self.value_peaks.shape)


class StatisticsAccumulator:
    """Sums over batches of tokens of one kind in one layer, in float64."""

    def __init__(self, kv_heads: int, head_dim: int, heads_per_group: int = 1) -> None:
        """Start with no tokens.

        Raises:
            UsageError: the heads can't be divided into such groups.
        """
        if heads_per_group < 1 or kv_heads % heads_per_group:
            raise UsageError(f"{kv_heads} KV heads can't be divided into groups of {heads_per_group}")
        self._groups = kv_heads // heads_per_group
        width, channels = heads_per_group * head_dim, kv_heads * head_dim
        self._key_moments = np.zeros((self._groups, width, width))
        self._value_moment = np.zeros((channels, channels))
        self._query_energies = np.zeros((kv_heads, head_dim // 2))
        self._key_peaks = np.zeros((kv_heads, head_dim // 2))
        self._value_peaks = np.zeros((kv_heads, head_dim))
        self._tokens = self._queries = 0

    def add_queries(self, queries: NDArray[Any]) -> None:
        """Count queries ``[queries, query heads, D]``, with bias, rotated or not: those that will look back
        at such tokens, which are fewer than the tokens.

        Raises:
            CalibrationError: a number is not finite.
        """
        queries = _finite("query", queries)
        pairs = queries.reshape(len(queries), len(self._query_energies), -1, 2, queries.shape[-1] // 2)
        self._query_energies += (pairs**2).mean(axis=(2, 3)).sum(axis=0)
        self._queries += len(queries)

    def add(
        self, keys: NDArray[Any], values: NDArray[Any], cosines: NDArray[Any], sines: NDArray[Any]
    ) -> None:
        """Count a batch of tokens.

        Args:
            keys: ``[tokens, KV heads, D]``, before rotation, without bias.
            values: ``[tokens, KV heads, D]``, without bias.
            cosines: ``[tokens, D/2]`` of the tokens' positions; ``sines`` likewise.

        Raises:
            CalibrationError: a number is not finite.
        """
        tokens, kv_heads, head_dim = keys.shape
        keys, values = _finite("key", keys), _finite("value", values)
        grouped = keys.reshape(tokens, self._groups, -1).swapaxes(0, 1)
        flat = values.reshape(tokens, kv_heads * head_dim)
        self._key_moments += grouped.swapaxes(1, 2) @ grouped
        self._value_moment += flat.T @ flat
        rotated = rotate(keys, cosines[:, None], sines[:, None]).reshape(tokens, kv_heads, 2, -1)
        self._key_peaks = np.maximum(self._key_peaks, np.abs(rotated).max(axis=(0, 2), initial=0.0))
        self._value_peaks = np.maximum(self._value_peaks, np.abs(values).max(axis=0, initial=0.0))
        self._tokens += tokens

    @property
    def tokens(self) -> int:
        """Tokens counted so far."""
        return self._tokens

    def finish(self) -> LayerStatistics:
        """Means and peaks of everything counted.

        Raises:
            CalibrationError: there were fewer tokens than channels, or no queries.
        """
        if not self._queries:
            raise CalibrationError("calibration saw no queries: add those of the prompts' last tokens")
        needed = len(self._value_moment)
        # Of fewer tokens than channels nothing is known in some directions.
        if self._tokens < needed:
            raise CalibrationError(
                f"calibration saw {self._tokens} tokens of a kind, but statistics of {needed} channels need "
                f"{needed} or more: give more or longer prompts"
            )
        return LayerStatistics(
            key_moments=self._key_moments / self._tokens,
            value_moment=self._value_moment / self._tokens,
            query_energies=self._query_energies / self._queries,
            key_peaks=self._key_peaks.copy(),
            value_peaks=self._value_peaks.copy(),
            tokens=self._tokens,
        )


def mix(visual: LayerStatistics, text: LayerStatistics, visual_weight: float) -> LayerStatistics:
    """Statistics of a cache whose rows are visual by this share. Peaks are the larger ones of both.

    Raises:
        UsageError: the share is outside [0, 1].
    """
    if not 0.0 <= visual_weight <= 1.0:
        raise UsageError(f"the share of visual tokens must lie in [0, 1], not {visual_weight:g}")

    def mean(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
        return visual_weight * first + (1.0 - visual_weight) * second

    return LayerStatistics(
        key_moments=mean(visual.key_moments, text.key_moments),
        value_moment=mean(visual.value_moment, text.value_moment),
        query_energies=mean(visual.query_energies, text.query_energies),
        key_peaks=np.maximum(visual.key_peaks, text.key_peaks),
        value_peaks=np.maximum(visual.value_peaks, text.value_peaks),
        tokens=visual.tokens + text.tokens,
    )


def _finite(name: str, numbers: NDArray[Any]) -> NDArray[np.float64]:
    exact = np.asarray(numbers, np.float64)
    if not np.isfinite(exact).all():
        raise CalibrationError(
            f"a {name} projection put out values that are not finite numbers: calibrate in float32 and check "
            "the weights"
        )
    return exact
