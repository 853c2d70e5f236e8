# SPDX-License-Identifier: Apache-2.0
"""A random attention layer with biased keys, M-RoPE and shared KV heads, and dense attention over it."""

from dataclasses import dataclass

import numpy as np

from starkv.lowrank.attend import Tail
from starkv.lowrank.rotary import Rotary, rotate, unrotate


@dataclass(frozen=True)
class Case:
    """What an exact cache holds, and where it came from."""

    rotary: Rotary
    queries: np.ndarray
    """``[query heads, D]``, rotated."""
    keys: np.ndarray
    """``[rows, KV heads, D]``, rotated, with bias."""
    values: np.ndarray
    """``[rows, KV heads, D]``, with bias."""
    positions: np.ndarray
    key_bias: np.ndarray
    value_bias: np.ndarray

    @property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rotary.tables(self.positions)

    @property
    def plain_keys(self) -> np.ndarray:
        """Before rotation, without bias."""
        cosines, sines = self.tables
        return unrotate(self.keys, cosines[:, None], sines[:, None]) - self.key_bias

    @property
    def plain_values(self) -> np.ndarray:
        return self.values - self.value_bias

    def tail(self, rows: slice | np.ndarray) -> Tail:
        return Tail(self.keys[rows], self.values[rows])


def make_case(
    rows: int = 40,
    kv_heads: int = 2,
    group: int = 7,
    head_dim: int = 32,
    bias_peak: float = 6.0,
    components: int = 3,
    seed: int = 0,
) -> Case:
    """Keys and values of decaying spectra. In each head one channel's key bias is ``bias_peak``, the others'
    are around 1; positions jump, as after eviction."""
    rng = np.random.default_rng(seed)
    pairs = head_dim // 2
    sections = (
        (pairs // 4, 3 * pairs // 8, pairs - pairs // 4 - 3 * pairs // 8) if components == 3 else (pairs,)
    )
    rotary = Rotary(1e6 ** (-np.arange(pairs) / pairs), sections)
    positions = np.sort(rng.integers(0, 900, (rows, components)), axis=0).astype(np.int32)
    channels = kv_heads * head_dim
    spectrum = np.exp(-np.arange(channels) / (channels / 6)) * 4
    plain = [
        (
            rng.normal(size=(rows, channels))
            * spectrum
            @ np.linalg.qr(rng.normal(size=(channels, channels)))[0]
        )
        for _ in range(2)
    ]
    key_bias, value_bias = rng.normal(size=(2, kv_heads, head_dim))
    key_bias[np.arange(kv_heads), rng.integers(3 * pairs // 4, pairs, kv_heads)] = bias_peak
    cosines, sines = rotary.tables(positions)
    keys = plain[0].reshape(rows, kv_heads, head_dim) + key_bias
    return Case(
        rotary,
        rng.normal(size=(kv_heads * group, head_dim)),
        rotate(keys, cosines[:, None], sines[:, None]),
        plain[1].reshape(rows, kv_heads, head_dim) + value_bias,
        positions,
        key_bias,
        value_bias,
    )


def dense(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[query heads, rows]`` and heads ``[query heads, D]`` of ordinary attention, head by head."""
    logits, heads = [], []
    for index, query in enumerate(queries):
        kv_head = index * keys.shape[1] // len(queries)
        scores = keys[:, kv_head] @ query / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        logits.append(scores)
        heads.append(weights @ values[:, kv_head] / weights.sum())
    return np.stack(logits), np.stack(heads)


def moment(outputs: np.ndarray) -> np.ndarray:
    """E[y yᵀ] of ``[rows, width]``."""
    return outputs.T @ outputs / len(outputs)
