# SPDX-License-Identifier: Apache-2.0
"""Quantized rows of full rank: static scales per channel, the key bias taken out.

In a few channels Qwen2's keys have biases that are far larger than all the rest of a key. Quantized with the
key they would set the scale and drown everything else. Here a stored key is the rotated key without its bias;
what the bias adds to a logit is worked out exactly, from the positions alone.

Codes lie as ONNX Runtime's GroupQueryAttention takes a cache quantized per channel: int8 as they are; int4
with 8 added, two per byte along the head dimension, the even channel in the low half.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from starkv.lowrank.pack import LEAST_MAGNITUDE, pack_nibbles, unpack_nibbles
from starkv.lowrank.rotary import Rotary, rotate
from starkv.lowrank.statistics import LayerStatistics

Bits = Literal[4, 8]


@dataclass(frozen=True)
class QuantizedRows:
    """Codes of a layer's cached rows."""

    keys: NDArray[Any]
    """int8 ``[rows, KV heads, D]``, or uint8 ``[rows, KV heads, D/2]``."""
    values: NDArray[Any]
    """As keys."""
    positions: NDArray[np.int32]
    """``[rows, components]``."""

    def first(self, rows: int | None) -> "QuantizedRows":
        """The first rows; all of them for None."""
        return QuantizedRows(self.keys[:rows], self.values[:rows], self.positions[:rows])


@dataclass(frozen=True)
class RowQuantization:
    """One layer's static scales and biases.

    Raises:
        ValueError: a rotary pair of keys has two scales, though rotation mixes its channels.
    """

    bits: Bits
    key_scales: NDArray[np.float32]
    """``[KV heads, D]``; channels i and i + D/2 share one."""
    value_scales: NDArray[np.float32]
    """``[KV heads, D]``."""
    key_bias: NDArray[np.float64]
    """``[KV heads, D]``, zeros for a model without."""
    value_bias: NDArray[np.float64]

    def __post_init__(self) -> None:
        first, second = np.split(self.key_scales, 2, axis=-1)
        if not np.array_equal(first, second):
            raise ValueError("both channels of a rotary pair of keys need the same scale")

    @property
    def bytes_per_row(self) -> int:
        """Memory of one token's key and value in this layer; there are no scales per row."""
        return 2 * self.key_scales.size * self.bits // 8

    def quantize(
        self, keys: NDArray[Any], values: NDArray[Any], positions: NDArray[np.int32], rotary: Rotary
    ) -> QuantizedRows:
        """Codes of exact cached rows ``[rows, KV heads, D]``: rotated keys and values, with their biases."""
        cosines, sines = rotary.tables(positions)
        without_bias = keys - rotate(self.key_bias, cosines[:, None], sines[:, None])
        return QuantizedRows(
            _codes(without_bias, self.key_scales, self.bits),
            _codes(values - self.value_bias, self.value_scales, self.bits),
            positions,
        )

    def stored_keys(self, rows: QuantizedRows) -> NDArray[np.float32]:
        """Rotated keys without their bias ``[rows, KV heads, D]``, as far as codes hold them."""
        return _signed(rows.keys, self.bits) * self.key_scales

    def stored_values(self, rows: QuantizedRows) -> NDArray[np.float32]:
        """Values without their bias ``[rows, KV heads, D]``, as far as codes hold them."""
        return _signed(rows.values, self.bits) * self.value_scales


def row_quantization(
    statistics: LayerStatistics,
    bits: Bits,
    key_bias: NDArray[np.float64],
    value_bias: NDArray[np.float64],
    clip_deviations: float | None = None,
) -> RowQuantization:
    """Static scales from what calibration saw.

    Args:
        key_bias: ``[KV heads, D]``; ``value_bias`` likewise. clip_deviations: clip what lies beyond so many
            root mean squares. With few bits a finer step is worth more than rare large values. Nothing that
            calibration saw is clipped where it is left out.
    """
    key_peaks, value_peaks = statistics.key_peaks, statistics.value_peaks
    if clip_deviations is not None:
        key_peaks = np.minimum(key_peaks, clip_deviations * statistics.key_deviations)
        value_peaks = np.minimum(value_peaks, clip_deviations * statistics.value_deviations)
    return RowQuantization(
        bits, key_scales(key_peaks, bits), value_scales(value_peaks, bits), key_bias, value_bias
    )


def key_scales(pair_peaks: NDArray[Any], bits: Bits) -> NDArray[np.float32]:
    """Scales ``[KV heads, D]`` from each pair's largest rotated key without bias, ``[KV heads, D/2]``."""
    return value_scales(np.concatenate([pair_peaks, pair_peaks], axis=-1), bits)


def value_scales(peaks: NDArray[Any], bits: Bits) -> NDArray[np.float32]:
    """Scales from the largest magnitude in each channel, in the same shape."""
    largest = np.float32(2 ** (bits - 1) - 1)
    scales: NDArray[np.float32] = np.maximum(peaks.astype(np.float32), LEAST_MAGNITUDE) / largest
    return scales


def key_bias_logits(
    queries: NDArray[Any], bias: NDArray[Any], positions: NDArray[Any], rotary: Rotary
) -> NDArray[np.float64]:
    """What the key bias adds to each logit: ``q · R(position) b``, not scaled by 1/√D.

    With the pair's channels (i, j), a pair adds ``cos(angle) (q_i b_i + q_j b_j) + sin(angle) (q_j b_i − q_i
    b_j)``, and its angle depends on one component of the position. So each component needs a table over its
    distinct values, and a row is one look-up per component.

    Args:
        queries: ``[query heads, D]``, rotated.
        bias: ``[KV heads, D]``.
        positions: ``[rows, components]``.

    Returns:
        ``[query heads, rows]``.
    """
    first, second = np.split(np.asarray(queries, np.float64), 2, axis=-1)
    repeated = np.repeat(np.asarray(bias, np.float64), len(queries) // len(bias), axis=0)
    bias_first, bias_second = np.split(repeated, 2, axis=-1)
    even = first * bias_first + second * bias_second
    odd = second * bias_first - first * bias_second
    logits = np.zeros((len(queries), len(positions)))
    for component in range(len(rotary.sections)):
        pairs = rotary.component_of_pair == component
        distinct, row = np.unique(positions[:, component], return_inverse=True)
        angles = distinct[:, None] * rotary.inverse_frequencies[pairs]
        table = even[:, pairs] @ np.cos(angles).T + odd[:, pairs] @ np.sin(angles).T
        logits += table[:, row]
    return logits


def _codes(exact: NDArray[Any], scales: NDArray[np.float32], bits: Bits) -> NDArray[Any]:
    largest = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(exact / scales), -largest - 1, largest).astype(np.int8)
    return pack_nibbles(codes) if bits == 4 else codes


def _signed(codes: NDArray[Any], bits: Bits) -> NDArray[np.int8]:
    return unpack_nibbles(codes, 2 * codes.shape[-1]) if bits == 4 else codes
