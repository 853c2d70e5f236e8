# SPDX-License-Identifier: Apache-2.0
"""Norms, rotation and attention in the operators that every supported parser knows.

TensorRT's optimizer recognises these patterns and fuses them; newer parsers' own operators (Attention from
10.14, RMSNormalization and RotaryEmbedding from 10.15) would make a second dialect to be wrong in.
"""

from collections.abc import Sequence

import onnx_ir as ir

from starkv.export.lower.graph_edit import remove_unused
from starkv.export.lower.trt_nodes import Replacement
from starkv.kernels.c_abi import FULL_ATTENTION_HEAD_DIMS
from starkv.onnx_ops import DOMAIN, FULL_ATTENTION

HIDDEN = -30000.0
"""Added to scores that a query doesn't see: its exponential is 0."""


def lower_to_primitives(graph: ir.Graph, vision_head_dim: int) -> None:
    """Replace operators that some parser lacks, and FullAttention where the plugin doesn't take its heads.

    Args:
        graph: changed; its values' dtypes are settled.
        vision_head_dim: of all attention that is no KVAttention.
    """
    keep_full_attention = vision_head_dim in FULL_ATTENTION_HEAD_DIMS
    biases: dict[ir.Value, ir.Value] = {}
    tables: dict[tuple[ir.Value, ir.DataType | None], ir.Value] = {}
    for node in list(graph):
        if node.op_type == "RMSNormalization" and not node.domain:
            _rms_norm(Replacement(graph, node), node)
        elif node.op_type == "RotaryEmbedding" and not node.domain:
            _rotary(Replacement(graph, node), node, tables)
        elif node.op_type == "Attention" and not node.domain:
            heads = node.attributes["q_num_heads"].as_int()
            _attention(Replacement(graph, node), node, heads, vision_head_dim, biases)
        elif node.op_type == FULL_ATTENTION and node.domain == DOMAIN and not keep_full_attention:
            heads = node.attributes["num_heads"].as_int()
            _attention(Replacement(graph, node), node, heads, vision_head_dim, biases)
    remove_unused(graph)


def _rms_norm(new: Replacement, node: ir.Node) -> None:
    """``x / sqrt(mean(x²) + ε) * weight``, in the dtype of x, which is float32 here."""
    x, weight = _given(node.inputs[:2])
    mean = new.op("ReduceMean", new.op("Mul", x, x), new.ints(-1), keepdims=1)
    deviation = new.op(
        "Sqrt", new.op("Add", mean, new.number(node.attributes["epsilon"].as_float(), _dtype(x)))
    )
    new.finish("Mul", new.op("Div", x, deviation), weight)


def _rotary(
    new: Replacement, node: ir.Node, tables: dict[tuple[ir.Value, ir.DataType | None], ir.Value]
) -> None:
    """Halves of each head: ``(a cos − b sin, b cos + a sin)``; x ``[B,S,heads*D]``, tables ``[B,S,D/2]``."""
    x, *both = _given(node.inputs[:3])
    heads = node.attributes["num_heads"].as_int()
    cos, sin = (_per_head(new, table, tables) for table in both)
    rows = new.op("Reshape", x, new.ints(0, 0, heads, 2, -1))
    first, second = (new.op("Gather", rows, new.ints(half), axis=3) for half in (0, 1))
    left = new.op("Sub", new.op("Mul", first, cos), new.op("Mul", second, sin))
    right = new.op("Add", new.op("Mul", second, cos), new.op("Mul", first, sin))
    new.finish("Reshape", new.op("Concat", left, right, axis=3), new.ints(0, 0, -1))


def _per_head(
    new: Replacement,
    table: ir.Value,
    tables: dict[tuple[ir.Value, ir.DataType | None], ir.Value],
) -> ir.Value:
    """A rotary table as ``[B,S,1,1,D/2]``, made once."""
    key = table, table.dtype
    if key not in tables:
        tables[key] = new.op("Unsqueeze", table, new.ints(2, 3))
    return tables[key]


def _attention(
    new: Replacement, node: ir.Node, heads: int, head_dim: int, biases: dict[ir.Value, ir.Value]
) -> None:
    """MatMul, Softmax, MatMul over ``[B,heads,N,D]``, scores and their softmax in float32.

    In float32 on purpose: TensorRT then does not fuse it into its attention kernels, which have been silently
    wrong on some GPUs (NVIDIA/TensorRT issue 4837: 16-bit attention on sm_120 up to 10.16.1). The scores of
    one call are stored, ``B * heads * N²``; for the windows of a 1080p screenshot that is under 50 MB.
    """
    q, k, v = _given(node.inputs[:3])
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    dtype = _dtype(q)

    def by_head(x: ir.Value, perm: list[int]) -> ir.Value:
        return new.op("Transpose", new.op("Reshape", x, new.ints(0, 0, heads, -1)), perm=perm)

    wide_q, wide_k = (new.cast(x, ir.DataType.FLOAT) for x in (q, k))
    scaled = new.op("Mul", wide_q, new.number(head_dim**-0.5, ir.DataType.FLOAT))
    scores = new.op("MatMul", by_head(scaled, [0, 2, 1, 3]), by_head(wide_k, [0, 2, 3, 1]))
    if mask is not None:
        if mask not in biases:
            seen, hidden = (new.number(number, ir.DataType.FLOAT) for number in (0.0, HIDDEN))
            biases[mask] = new.op("Where", mask, seen, hidden)
            biases[mask].dtype = ir.DataType.FLOAT
        scores = new.op("Add", scores, biases[mask])
    weights = new.cast(new.op("Softmax", scores, axis=-1), dtype)
    attended = new.op("MatMul", weights, by_head(v, [0, 2, 1, 3]))
    new.finish("Reshape", new.op("Transpose", attended, perm=[0, 2, 1, 3]), new.ints(0, 0, -1))


def _given(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Inputs that an operator can't do without."""
    return [value for value in values if value is not None]


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ValueError(f"the dtype of {value.name} is not settled")
    return value.dtype
