# SPDX-License-Identifier: Apache-2.0
"""Numpy reference of a decode step over a packed history and a raw tail, with one softmax over both.

The history is either latents (low rank) or static-scale codes of every channel (quantized); the tail holds
the most recent rows as the model computed them. Rows know their positions: after eviction a row's number says
nothing about where its token stood.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.lowrank.layer import LowRankLayer
from starkv.lowrank.quantized_rows import QuantizedRows, RowQuantization, key_bias_logits
from starkv.lowrank.rotary import Rotary


@dataclass(frozen=True)
class LatentRows:
    """A low-rank history, unpacked."""

    keys: Sequence[NDArray[Any]]
    """``[capacity, rank]`` of each group."""
    values: NDArray[Any]
    """``[capacity, rank]``."""
    positions: NDArray[np.int32]
    """``[capacity, components]``."""
    valid: int | None = None
    """Rows in use, the first ones; the others are never read. All of them where it is left out."""


@dataclass(frozen=True)
class Tail:
    """Recent rows, exact, as an uncompressed cache holds them."""

    keys: NDArray[Any]
    """``[rows, KV heads, D]``, rotated, with bias."""
    values: NDArray[Any]
    """``[rows, KV heads, D]``, with bias."""


@dataclass(frozen=True)
class Attended:
    """What a decode step works out."""

    logits: NDArray[np.float64]
    """``[query heads, valid rows + tail]``, scaled by 1/√D."""
    heads: NDArray[np.float64]
    """``[query heads, D]``, value bias included, before the output projection."""


def attend_low_rank(
    queries: NDArray[Any], history: LatentRows, tail: Tail, layer: LowRankLayer, rotary: Rotary
) -> Attended:
    """Attention of one token over latents and tail.

    Values are never rebuilt: probabilities are summed over latents, and the sum alone is lifted.

    Args:
        queries: ``[query heads, D]``, rotated, not scaled. Heads of a group lie next to each other.
    """
    rows = slice(0, history.valid)
    cosines, sines = rotary.tables(history.positions[rows])
    keys = layer.lifted_keys([latent[rows] for latent in history.keys], cosines, sines)
    logits = np.concatenate([_logits(queries, keys), _logits(queries, tail.keys)], axis=-1)
    logits *= layer.head_dim**-0.5
    old, recent = np.split(softmax(logits), [len(keys)], axis=-1)
    lifted = layer.values.lift(old @ history.values[rows]).reshape(len(queries), -1, layer.head_dim)
    kv_head = np.arange(len(queries)) * lifted.shape[1] // len(queries)
    heads = lifted[np.arange(len(queries)), kv_head] + _weighted(recent, tail.values)
    return Attended(logits, heads + old.sum(axis=-1, keepdims=True) * layer.value_bias[kv_head])


def attend_quantized(
    queries: NDArray[Any],
    history: QuantizedRows,
    tail: Tail,
    quantization: RowQuantization,
    rotary: Rotary,
    valid: int | None = None,
) -> Attended:
    """Attention of one token over quantized rows and tail.

    A logit is the query times the stored key plus the query times the rotated bias. The value bias is added
    once.

    Args:
        queries: ``[query heads, D]``, rotated, not scaled.
        valid: rows of the history in use, the first ones; the others are never read.
    """
    rows = history.first(valid)
    bias = quantization.key_bias
    keys, values = quantization.stored_keys(rows), quantization.stored_values(rows)
    logits = _logits(queries, keys) + key_bias_logits(queries, bias, rows.positions, rotary)
    logits = np.concatenate([logits, _logits(queries, tail.keys)], axis=-1) * bias.shape[1] ** -0.5
    old, recent = np.split(softmax(logits), [len(keys)], axis=-1)
    repeated = np.repeat(quantization.value_bias, len(queries) // len(bias), axis=0)
    heads = _weighted(old, values) + _weighted(recent, tail.values)
    return Attended(logits, heads + old.sum(axis=-1, keepdims=True) * repeated)


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Probabilities along the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: NDArray[Any] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def _logits(queries: NDArray[Any], keys: NDArray[Any]) -> NDArray[np.float64]:
    """``[query heads, rows]`` of keys ``[rows, KV heads, D]``."""
    grouped = queries.reshape(keys.shape[1], -1, queries.shape[-1])
    logits: NDArray[np.float64] = np.einsum("hqd,nhd->hqn", grouped, keys, dtype=np.float64)
    return logits.reshape(len(queries), len(keys))


def _weighted(probabilities: NDArray[Any], values: NDArray[Any]) -> NDArray[np.float64]:
    """Sums ``[query heads, D]`` of values ``[rows, KV heads, D]``, by ``[query heads, rows]``."""
    heads_per_kv_head = len(probabilities) // values.shape[1]
    grouped = probabilities.reshape(values.shape[1], heads_per_kv_head, len(values))
    heads: NDArray[np.float64] = np.einsum("hqn,nhd->hqd", grouped, values, dtype=np.float64)
    return heads.reshape(len(probabilities), values.shape[-1])
