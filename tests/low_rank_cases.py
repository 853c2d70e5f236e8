# SPDX-License-Identifier: Apache-2.0
"""Packed decode attention in plain numpy, row by row and in float64, and random cases of it."""

from typing import Any

import numpy as np

from starkv.onnx_low_rank_shape import LowRankShape

Arrays = dict[str, np.ndarray]
POSITIONS = 50
"""Rows of the rotary tables."""


def rotary_tables(
    dim: int, positions: int = POSITIONS, theta: float = 100.0
) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(positions)[:, None] * theta ** (-2 * np.arange(dim // 2) / dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: np.ndarray, position: np.ndarray, section: tuple[int, ...], feeds: Arrays) -> np.ndarray:
    """x [D] at position [3] → [D]; pair i is (i, i + D/2)."""
    half = len(x) // 2
    turned = np.empty(len(x))
    component = np.repeat(np.arange(len(section)), section)
    for i in range(half):
        cos, sin = (feeds[table][position[component[i]], i] for table in ("cos_table", "sin_table"))
        turned[i] = x[i] * cos - x[i + half] * sin
        turned[i + half] = x[i + half] * cos + x[i] * sin
    return turned


def softmax(scores: np.ndarray) -> np.ndarray:
    exponents = np.exp(scores - scores.max())
    return exponents / exponents.sum()


def quantized(x: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes of x [..., n] with one scale for n channels, rounded to bfloat16 → (codes, scale)."""
    scale = np.maximum(np.abs(x).max(-1, initial=0), 1e-5).astype(np.float32) / np.float32(limit)
    codes = np.clip(np.rint(x / scale[..., None]), -limit - 1, limit).astype(int)
    bits = scale.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return codes, rounded.view(np.float32)


def half_bytes(codes: np.ndarray) -> np.ndarray:
    """Signed codes [..., n] → bytes [..., ceil(n/2)], even channels low, plus 8."""
    odd = codes.shape[-1] % 2
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, odd)]) + 8
    return (padded[..., 0::2] | padded[..., 1::2] << 4).astype(np.uint8)


def packed_block(latents: np.ndarray, outliers: int, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents [..., n] → (codes [..., n], scales [..., 2], what the codes mean [..., n])."""
    parts = [quantized(part, limit) for part in (latents[..., :outliers], latents[..., outliers:])]
    meaning = np.concatenate([codes * scale[..., None] for codes, scale in parts], axis=-1)
    codes = np.concatenate([codes for codes, _ in parts], axis=-1)
    return codes, np.stack([scale for _, scale in parts], axis=-1), meaning


def random_case(
    shape: LowRankShape,
    packed: list[int],
    tail: list[int],
    *,
    capacity: int = 9,
    tail_capacity: int = 6,
    bias: bool = True,
    seed: int = 0,
) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Inputs of ``LowRankKVAttention`` and what its latents mean: keys [B,C,W], values [B,C,R]."""
    random = np.random.default_rng(seed)
    batch, dim = len(packed), shape.head_dim

    def normal(*size: int) -> np.ndarray:
        return random.standard_normal(size).astype(np.float32)

    cos, sin = rotary_tables(dim)
    up_k = np.zeros((shape.key_lanes.lanes, shape.group_heads * dim), np.float32)
    keys = np.zeros((batch, capacity, shape.key_lanes.lanes), np.float32)
    for offset, rank in zip(shape.key_lanes.offsets, shape.key_ranks, strict=True):
        up_k[offset : offset + rank] = normal(rank, up_k.shape[1]) / np.sqrt(rank)
        keys[:, :, offset : offset + rank] = normal(batch, capacity, rank)
    values = normal(batch, capacity, shape.value_rank)
    feeds: dict[str, Any] = {
        "q": normal(batch, 1, shape.heads * dim),
        "k": normal(batch, 1, shape.kv_heads * dim),
        "v": normal(batch, 1, shape.kv_heads * dim),
        "packed_len": np.array(packed, np.int32),
        "positions": random.integers(0, POSITIONS, (batch, capacity, 3), dtype=np.int32),
        "tail_k": normal(batch, shape.kv_heads, tail_capacity, dim),
        "tail_v": normal(batch, shape.kv_heads, tail_capacity, dim),
        "tail_len": np.array(tail, np.int32),
        "up_k": up_k,
        "k_bias": normal(shape.kv_heads * dim) * np.float32(bias),
        "up_v": normal(shape.kv_heads * dim, shape.value_rank) / np.sqrt(np.float32(shape.value_rank)),
        "v_bias": normal(shape.kv_heads * dim) * np.float32(bias),
        "cos_table": cos,
        "sin_table": sin,
    }
    packed_feeds, key_meaning, value_meaning = pack(shape, keys, values)
    return feeds | packed_feeds, key_meaning, value_meaning


def pack(shape: LowRankShape, keys: np.ndarray, values: np.ndarray) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Latents in the storage of ``shape`` → (inputs, what the keys' and the values' codes mean)."""
    if shape.storage == "float":
        return {"k_latent": keys, "v_latent": values}, keys, values
    limit = 7 if shape.storage == "int4" else 127
    groups = [
        packed_block(keys[..., offset : offset + width], int(0.2 * rank), limit)
        for offset, width, rank in zip(
            shape.key_lanes.offsets, shape.key_lanes.widths, shape.key_ranks, strict=True
        )
    ]
    outliers = int(0.2 * shape.value_rank)
    v_codes, v_scales, value_meaning = packed_block(values, outliers, limit)
    k_codes = np.concatenate([codes for codes, _, _ in groups], axis=-1)
    if shape.storage == "int4":
        k_codes = half_bytes(k_codes)
        row = np.concatenate([half_bytes(v_codes[..., :outliers]), half_bytes(v_codes[..., outliers:])], -1)
        v_codes = np.pad(row, [(0, 0), (0, 0), (0, -row.shape[-1] % 8)], constant_values=0x88)
    stored = np.uint8 if shape.storage == "int4" else np.int8
    feeds = {
        "k_codes": k_codes.astype(stored),
        "k_scales": np.stack([scales for _, scales, _ in groups], axis=-2),
        "v_codes": v_codes.astype(stored),
        "v_scales": v_scales,
    }
    return feeds, np.concatenate([meaning for _, _, meaning in groups], axis=-1), value_meaning


def low_rank_attention(
    shape: LowRankShape, feeds: Arrays, keys: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out, present_tail_k and present_tail_v, given what the packed latents mean."""
    batch, dim = len(feeds["q"]), shape.head_dim
    exact = {name: array.astype(np.float64) for name, array in feeds.items() if array.dtype == np.float32}
    tail_k, tail_v = feeds["tail_k"].copy(), feeds["tail_v"].copy()
    out = np.zeros((batch, shape.heads, dim))
    for b in range(batch):
        new, rows = int(feeds["tail_len"][b]), int(feeds["packed_len"][b])
        tail_k[b, :, new] = feeds["k"][b, 0].reshape(shape.kv_heads, dim)
        tail_v[b, :, new] = feeds["v"][b, 0].reshape(shape.kv_heads, dim)
        for head in range(shape.heads):
            kv_head = head // (shape.heads // shape.kv_heads)
            group, member = divmod(kv_head, shape.group_heads)
            offset, rank = shape.key_lanes.offsets[group], shape.key_ranks[group]
            channels = slice(kv_head * dim, (kv_head + 1) * dim)
            up_k = exact["up_k"][offset : offset + rank, member * dim : (member + 1) * dim]
            query = exact["q"][b, 0, head * dim : (head + 1) * dim]
            head_keys, head_values = [], []
            for row in range(rows):
                lifted = keys[b, row, offset : offset + rank] @ up_k + exact["k_bias"][channels]
                position = feeds["positions"][b, row]
                head_keys.append(rotate(lifted, position, shape.mrope_section, exact))
                head_values.append(exact["up_v"][channels] @ values[b, row] + exact["v_bias"][channels])
            head_keys += list(tail_k[b, kv_head, : new + 1])
            head_values += list(tail_v[b, kv_head, : new + 1])
            weights = softmax(np.array(head_keys) @ query / np.sqrt(dim))
            out[b, head] = weights @ np.array(head_values)
    return out.reshape(batch, 1, -1), tail_k, tail_v
