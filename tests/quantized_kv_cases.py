# SPDX-License-Identifier: Apache-2.0
"""Decode attention over a quantized cache in plain numpy, row by row in float64, and random cases of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from low_rank_cases import POSITIONS, Arrays, half_bytes, rotary_tables, rotate, softmax


@dataclass(frozen=True)
class QuantizedCase:
    """Attributes of the operator and sizes."""

    bits: int
    heads: int = 6
    kv_heads: int = 2
    dim: int = 16
    section: tuple[int, ...] = (1, 3, 4)

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "num_heads": self.heads,
            "kv_num_heads": self.kv_heads,
            "bits": self.bits,
            "mrope_section": list(self.section),
        }

    def codes(self, plain: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Stored codes of x [..., D] without bias."""
        limit = 2 ** (self.bits - 1)
        codes = np.clip(np.rint(plain / scale), -limit, limit - 1).astype(int)
        return half_bytes(codes) if self.bits == 4 else codes.astype(np.int8)

    def meaning(self, stored: np.ndarray) -> np.ndarray:
        """Signed codes [..., D] of what is stored."""
        if self.bits == 8:
            return stored.astype(np.float64)
        halves = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.float64) - 8
        return halves.reshape(*stored.shape[:-1], -1)


def random_feeds(
    case: QuantizedCase, lengths: list[int], *, capacity: int = 12, bias: bool = True, seed: int = 0
) -> Arrays:
    """Inputs of ``QuantizedKVAttention``; every stored row was made from a row with its bias."""
    random = np.random.default_rng(seed)
    batch, channels = len(lengths), case.kv_heads * case.dim
    cos, sin = rotary_tables(case.dim)
    pair_scale = random.uniform(0.5, 1.5, (case.kv_heads, 1, case.dim // 2)).repeat(2, axis=1)
    step = 4 / 2 ** (case.bits - 1)
    stored = (np.int8, -128, 128, case.dim) if case.bits == 8 else (np.uint8, 0, 256, case.dim // 2)
    past = (
        random.integers(stored[1], stored[2], (batch, case.kv_heads, capacity, stored[3])).astype(stored[0])
        for _ in range(2)
    )

    def normal(*size: int) -> np.ndarray:
        return random.standard_normal(size).astype(np.float32)

    return {
        "q": normal(batch, 1, case.heads * case.dim),
        # Some of these saturate, and a rounded sum of products is exact in no implementation.
        "k": 2 * normal(batch, 1, channels),
        "v": 2 * normal(batch, 1, channels),
        "past_k": next(past),
        "past_v": next(past),
        "kv_len": np.array(lengths, np.int32),
        "positions": random.integers(0, POSITIONS, (batch, capacity, 3), dtype=np.int32),
        "k_scale": (pair_scale * step).reshape(-1).astype(np.float32),
        "v_scale": (random.uniform(0.5, 1.5, channels) * step).astype(np.float32),
        "k_bias": 5 * normal(channels) * np.float32(bias),
        "v_bias": normal(channels) * np.float32(bias),
        "cos_table": cos,
        "sin_table": sin,
    }


def rotated_bias(case: QuantizedCase, feeds: Arrays, position: np.ndarray) -> np.ndarray:
    """R(position) b of each KV head: [Hkv,D] float64."""
    bias = feeds["k_bias"].reshape(case.kv_heads, case.dim).astype(np.float64)
    return np.stack([rotate(head, position, case.section, feeds) for head in bias])


def quantized_kv_attention(case: QuantizedCase, feeds: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out, present_k and present_v."""
    heads = (case.kv_heads, case.dim)
    present_k, present_v = feeds["past_k"].copy(), feeds["past_v"].copy()
    k_scale, v_scale = (feeds[name].reshape(heads) for name in ("k_scale", "v_scale"))
    v_bias = feeds["v_bias"].reshape(heads).astype(np.float64)
    out = np.zeros((len(feeds["q"]), case.heads, case.dim))
    for b, length in enumerate(feeds["kv_len"].tolist()):
        new_bias = rotated_bias(case, feeds, feeds["positions"][b, length])
        present_k[b, :, length] = case.codes(feeds["k"][b, 0].reshape(heads) - new_bias, k_scale)
        present_v[b, :, length] = case.codes(feeds["v"][b, 0].reshape(heads) - v_bias, v_scale)
        biases = np.stack([rotated_bias(case, feeds, at) for at in feeds["positions"][b, : length + 1]])
        for head in range(case.heads):
            shared = head // (case.heads // case.kv_heads)
            keys = case.meaning(present_k[b, shared, : length + 1]) * k_scale[shared] + biases[:, shared]
            values = case.meaning(present_v[b, shared, : length + 1]) * v_scale[shared] + v_bias[shared]
            query = feeds["q"][b, 0].reshape(case.heads, case.dim)[head].astype(np.float64)
            out[b, head] = softmax(keys @ query / np.sqrt(case.dim)) @ values
    return out.reshape(len(out), 1, -1), present_k, present_v
