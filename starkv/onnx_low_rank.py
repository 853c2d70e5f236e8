# SPDX-License-Identifier: Apache-2.0
"""``LowRankKVAttention``: decode attention over a packed low-rank KV cache, as an ONNX function.

The method is STAR-KV (arXiv 2606.08382): keys are cached before rotation and without bias as latents of one
factor per group of KV heads, values as latents of one factor per layer. Ranks differ from layer to layer and
from group to group, so there is one function per :class:`LowRankShape`. Its body runs in any ONNX runtime and
is what every faster implementation is tested against.

Symbols: B sequences, Hq query heads, Hkv KV heads, D head dim, G groups of KV heads, C packed rows of
capacity (1 or more), T tail rows of capacity, P positions in the rotary tables, W key lanes, R value rank.

===================== ========================= =======================================================
input                 type                      meaning
===================== ========================= =======================================================
q                     [B,1,Hq*D] f32            queries, rotated
k, v                  [B,1,Hkv*D] f32           the new row, with bias; k rotated
k_codes               :class:`LowRankShape`     key latents, packed, group behind group
k_scales              [B,C,G,2] f32 or bf16     of outlier and inlier channels; not with "float"
v_codes               :class:`LowRankShape`     value latents, packed
v_scales              [B,C,2] f32 or bf16       likewise
packed_len            [B] i32                   packed rows in use, from row 0
positions             [B,C,3] i32               (t, h, w) of packed rows, 0 … P-1 in unused ones too
tail_k, tail_v        [B,Hkv,T,D] f32           rows kept as they are, with bias; keys rotated
tail_len              [B] i32                   tail rows in use; the new row goes behind them
up_k                  [W, Hkv*D/G] f32          lane → channels of its group, 0 in padding lanes
k_bias, v_bias        [Hkv*D] f32               zero in models without
up_v                  [Hkv*D, R] f32            latent → channels
cos_table, sin_table  [P, D/2] f32              of position p and rotary pair i
===================== ========================= =======================================================

Outputs: out [B,1,Hq*D]; present_tail_k and present_tail_v [B,Hkv,T,D], which may share the memory of tail_k
and tail_v. Rows that are not in use are never seen, but must hold finite numbers.
"""

import numpy as np
import onnx

from starkv.onnx_function_body import FunctionBody
from starkv.onnx_low_rank_lanes import Lanes, key_lanes, value_latents
from starkv.onnx_low_rank_shape import LowRankShape

_I64 = onnx.TensorProto.INT64

_NEW_ROW = ("q", "k", "v")
_CODES = ("k_codes", "k_scales", "v_codes", "v_scales")
_LATENTS = ("k_latent", "v_latent")
_ROWS = ("packed_len", "positions", "tail_k", "tail_v", "tail_len")
_CONSTANTS = ("up_k", "k_bias", "up_v", "v_bias", "cos_table", "sin_table")
OUTPUTS = ("out", "present_tail_k", "present_tail_v")


def low_rank_inputs(shape: LowRankShape) -> tuple[str, ...]:
    """Names of the operator's inputs in their order."""
    packed = _LATENTS if shape.storage == "float" else _CODES
    return (*_NEW_ROW, *packed, *_ROWS, *_CONSTANTS)


def low_rank_function(shape: LowRankShape) -> onnx.FunctionProto:
    """The operator's definition for one shape, in standard operators of opset 23; its name is
    ``shape.function_name``."""
    body = FunctionBody()
    heads, dim = shape.kv_heads, shape.head_dim
    group_queries = shape.heads // heads

    packed_len = body.op("Cast", "packed_len", to=_I64)
    tail_len = body.op("Cast", "tail_len", to=_I64)
    # Work follows the longest sequence. At least one row, seen or not, because empty tensors are a corner
    # that runtimes get wrong.
    packed_rows = body.op("Max", body.op("ReduceMax", packed_len), body.ints(1))
    tail_rows = body.op("Add", body.op("ReduceMax", tail_len), body.ints(1))
    present_k = _append(body, "tail_k", "k", tail_len, shape)
    present_v = _append(body, "tail_v", "v", tail_len, shape)

    def packed(name: str) -> str:
        return body.op("Slice", name, body.ints(0), packed_rows, body.ints(1))

    def tail(present: str) -> str:
        return body.op("Slice", present, body.ints(0), tail_rows, body.ints(2))

    quantized = shape.storage != "float"
    k_codes, v_codes = ("k_codes", "v_codes") if quantized else _LATENTS
    keys = key_lanes(body, shape, packed(k_codes), packed("k_scales") if quantized else None)

    scaled = body.op("Mul", "q", body.scalar(dim**-0.5))
    queries = body.op("Transpose", body.reshape(scaled, 0, heads, group_queries, dim), perm=[0, 1, 3, 2])
    packed_scores = _packed_scores(body, shape, keys, queries, packed("positions"), packed_rows)
    tail_scores = body.op("MatMul", tail(present_k), queries)
    scores = body.op("Transpose", body.concat([packed_scores, tail_scores], axis=2), perm=[0, 1, 3, 2])
    seen = body.concat(
        [
            _below(body, packed_rows, packed_len),
            _below(body, tail_rows, body.op("Add", tail_len, body.ints(1))),
        ]
    )
    seen_scores = body.op("Where", seen, scores, body.scalar(-np.inf))
    weights = body.op("Softmax", seen_scores, axis=-1)
    sizes = body.op("Concat", packed_rows, tail_rows, axis=0)
    packed_weights, tail_weights = body.ops("Split", weights, sizes, outputs=2, axis=-1)

    flat_weights = body.reshape(packed_weights, 0, shape.heads, -1)
    latents = value_latents(
        body, shape, flat_weights, packed(v_codes), packed("v_scales") if quantized else None
    )
    by_head = body.op("Transpose", body.reshape("up_v", heads, dim, shape.value_rank), perm=[0, 2, 1])
    up_v = _reordered(body, by_head, latents, axis=1)
    latents_by_head = body.reshape(latents.values, 0, heads, group_queries, -1)
    lifted = body.op("MatMul", latents_by_head, up_v)
    # Tail rows hold their bias, packed rows do not.
    packed_share = body.op("ReduceSum", packed_weights, body.ints(-1), keepdims=1)
    bias = body.op("Mul", packed_share, body.reshape("v_bias", heads, 1, dim))
    from_tail = body.op("MatMul", tail_weights, tail(present_v))
    attended = body.op("Add", body.op("Add", lifted, bias), from_tail)
    out = body.reshape(attended, 0, 1, -1)
    outputs = dict(zip(OUTPUTS, (out, present_k, present_v), strict=True))
    return body.function(shape.function_name, low_rank_inputs(shape), outputs)


def _append(body: FunctionBody, tail: str, row: str, tail_len: str, shape: LowRankShape) -> str:
    """Write the new row behind the tail's: [B,1,Hkv*D] → [B,Hkv,T,D]."""
    by_head = body.reshape(row, 0, shape.kv_heads, 1, shape.head_dim)
    index = body.op("Expand", body.reshape(tail_len, -1, 1, 1, 1), body.op("Shape", by_head))
    return body.op("ScatterElements", tail, index, by_head, axis=2)


def _below(body: FunctionBody, rows: str, limit: str) -> str:
    """Which of the first rows are below each sequence's limit: bool [B,1,1,rows]."""
    zero, one = (body.constant(np.array(number, np.int64)) for number in (0, 1))
    index = body.op("Range", zero, body.op("Squeeze", rows), one)
    return body.op("Less", index, body.reshape(limit, -1, 1, 1, 1))


def _packed_scores(
    body: FunctionBody, shape: LowRankShape, keys: list[Lanes], queries: str, positions: str, rows: str
) -> str:
    """Scores of the packed rows: lifted once per KV head, with bias, rotated, times the head's queries.

    Head by head, so that a head's keys stay in the processor's cache between the operators.

    Args:
        keys: latents of each group.
        queries: [B,Hkv,D,Hq/Hkv], rotated and scaled.
        positions: [B,n,3] i32.
        rows: [1] i64, n.

    Returns:
        [B,Hkv,n,Hq/Hkv].
    """
    cos, sin = (_rotary_rows(body, shape, table, positions) for table in ("cos_table", "sin_table"))
    batch = body.op("Shape", "q", start=0, end=1)
    key_shape = body.op("Concat", batch, body.ints(1), rows, body.ints(shape.head_dim), axis=0)
    group_factors = body.split("up_k", shape.key_lanes.widths, axis=0)
    biases = body.split("k_bias", (shape.head_dim,) * shape.kv_heads)
    head_queries = body.split(queries, (1,) * shape.kv_heads, axis=1)
    scores: list[str] = []
    for lanes, factor in zip(keys, group_factors, strict=True):
        in_order = _reordered(body, factor, lanes, axis=0)
        for up in body.split(in_order, (shape.head_dim,) * shape.group_heads):
            head = len(scores)
            lifted = body.op("Gemm", lanes.values, up, biases[head])
            rotated = body.op("RotaryEmbedding", body.op("Reshape", lifted, key_shape), cos, sin)
            scores.append(body.op("MatMul", rotated, head_queries[head]))
    return body.concat(scores, axis=1)


def _rotary_rows(body: FunctionBody, shape: LowRankShape, table: str, positions: str) -> str:
    """Rows of a rotary table for (t, h, w) positions: [B,n,3] → [B,n,D/2]."""
    sections = body.split(table, shape.mrope_section)
    parts = []
    for component, section in enumerate(sections):
        index = body.constant(np.array(component, np.int64))
        parts.append(body.op("Gather", section, body.op("Gather", positions, index, axis=2), axis=0))
    return body.concat(parts)


def _reordered(body: FunctionBody, factor: str, lanes: Lanes, axis: int) -> str:
    """The factor's rows in the order and with the multipliers of the lanes: constant, folded on loading."""
    if np.array_equal(lanes.channels, np.arange(len(lanes.channels))) and np.all(lanes.factors == 1):
        return factor
    rows = body.op("Gather", factor, body.constant(lanes.channels), axis=axis)
    return body.op("Mul", rows, body.constant(lanes.factors[:, None]))
