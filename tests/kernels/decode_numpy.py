# SPDX-License-Identifier: Apache-2.0
"""Decode attention over latents and over codes in plain numpy and float64, row by row of the definition."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.kernels.low_rank_call import LowRankCall
from starkv.kernels.quantized_rows_call import QuantizedRowsCall

Array = NDArray[Any]


def array(tensor: Any) -> Array:
    values: Array = tensor.detach().cpu().double().numpy()
    return values


def nibbles(row: Array) -> list[int]:
    """Codes of a row of bytes, the low half of each first."""
    return [half for byte in row.astype(int) for half in (byte % 16 - 8, byte // 16 - 8)]


def turned(vector: Array, angles: Array) -> Array:
    half = len(vector) // 2
    turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


def angles_of(call: Any, sequence: int, row: int) -> Array:
    """Of the rotary pairs of one row, read off the tables that the call brings."""
    components = np.repeat([0, 1, 2], call.sections)
    position = call.positions[sequence, row].cpu().numpy()[components]
    pair = np.arange(len(components))
    return np.arctan2(array(call.sines)[position, pair], array(call.cosines)[position, pair])


def key_of(call: LowRankCall, sequence: int, row: int, head: int) -> Array:
    factors = call.factors
    sharers = factors.kv_heads // len(factors.key_ranks)
    factor = head // sharers
    start = sum(-(-rank // 16) * 16 for rank in factors.key_ranks[:factor])
    rank = factors.key_ranks[factor]
    stored = array(call.keys[sequence, row])
    codes = np.array(nibbles(stored) if factors.form == "int4" else stored)[start : start + rank]
    if call.key_scales is not None:
        strong, weak = array(call.key_scales[sequence, row, factor])
        codes = codes * np.where(np.arange(rank) < int(0.2 * rank), strong, weak)
    lifted = codes @ array(factors.up_k[head % sharers])[start : start + rank]
    return turned(lifted + array(factors.key_bias)[head], angles_of(call.where, sequence, row))


def value_latent(call: LowRankCall, sequence: int, row: int) -> Array:
    """Of all heads, in the order of channels."""
    factors, stored = call.factors, array(call.values[sequence, row])
    rank = factors.value_rank
    strong = int(0.2 * rank)
    if factors.form == "int4":
        strong_bytes = (strong + 1) // 2
        codes = nibbles(stored[:strong_bytes])[:strong]
        codes += nibbles(stored[strong_bytes:])[: rank - strong]
        stored = np.array(codes, float)
    if call.value_scales is not None:
        scales = array(call.value_scales[sequence, row])
        stored = stored * np.where(np.arange(rank) < strong, *scales)
    return stored


def low_rank(call: LowRankCall, value_factor: Array, sequence: int) -> tuple[Array, Array]:
    """Output ``[H, D]`` and log Σ exp(logit) ``[H]`` of one sequence.

    Args:
        call: what the kernels get.
        value_factor: ``[G · D, rank]`` as it was before it was laid out.
        sequence: which one.
    """
    factors = call.factors
    dim, rows = factors.head_dim, int(call.n_valid[sequence])
    out, log_sum = [], []
    latents = [value_latent(call, sequence, row) for row in range(rows)]
    for query_head, q in enumerate(array(call.q[sequence])):
        head = query_head // call.sharing
        bias = array(factors.value_bias)[head]
        lift = value_factor[head * dim : (head + 1) * dim]
        keys = [key_of(call, sequence, row, head) for row in range(rows)]
        values = [lift @ latent + bias for latent in latents]
        if call.tail is not None:
            tail_rows = int(call.tail.n_valid[sequence])
            keys += list(array(call.tail.k[sequence, head, :tail_rows]))
            extra = 0 if call.tail.values_have_bias else bias
            values += list(array(call.tail.v[sequence, head, :tail_rows]) + extra)
        attended = softmax_sum(q, keys, values)
        out.append(attended[0])
        log_sum.append(attended[1])
    return np.stack(out), np.array(log_sum)


def quantized(call: QuantizedRowsCall, sequence: int) -> tuple[Array, Array]:
    """Output ``[H, D]`` and log Σ exp(logit) ``[H]`` of one sequence."""
    out, log_sum = [], []
    packed = call.k.shape[-1] != call.q.shape[-1]
    for query_head, q in enumerate(array(call.q[sequence])):
        head = query_head // call.sharing
        keys, values = [], []
        for row in range(int(call.n_valid[sequence])):
            codes = [array(cache[sequence, head, row]) for cache in (call.k, call.v)]
            k, v = (np.array(nibbles(code)) if packed else code for code in codes)
            key, value = k * array(call.k_scales)[head], v * array(call.v_scales)[head]
            if call.key_bias is not None:
                angles = angles_of(call.key_bias.where, sequence, row)
                key = key + turned(array(call.key_bias.bias)[head], angles)
            if call.value_bias is not None:
                value = value + array(call.value_bias)[head]
            keys.append(key)
            values.append(value)
        attended = softmax_sum(q, keys, values)
        out.append(attended[0])
        log_sum.append(attended[1])
    return np.stack(out), np.array(log_sum)


def softmax_sum(q: Array, keys: list[Array], values: list[Array]) -> tuple[Array, float]:
    logits = np.array([q @ key for key in keys]) / np.sqrt(len(q))
    mass = np.exp(logits - logits.max())
    total = mass.sum()
    attended: Array = np.array(mass / total @ np.stack(values))
    return attended, float(logits.max() + np.log(total))
