# SPDX-License-Identifier: Apache-2.0
"""Custom ONNX operators of the domain ``ai.starkv``.

Each is an ONNX *function*: its body in standard operators is the definition, runs in any ONNX runtime and is
what every faster implementation is tested against. A dialect of the graph swaps the body or drops it for a
plugin of the same name; the node itself never changes.

All bodies use opset 23, the newest that ONNX Runtime 1.23 (the last one for Python 3.10) reads.
ScatterElements with a mask says the same as the younger TensorScatter with ``nonpad_kv_seqlen``, and it says
which key each query sees explicitly: runtimes disagree on how ``is_causal`` aligns when queries and keys
differ in number.
"""

import onnx
import onnx.parser

DOMAIN = "ai.starkv"
DOMAIN_VERSION = 1
OPSET = 23

KV_ATTENTION = "KVAttention"
FULL_ATTENTION = "FullAttention"

# q [B,S,Hq*D], k and v [B,S,Hkv*D], past_k and past_v [B,Hkv,C,D], kv_len [B] i32, past_extent [P] i8
# -> out [B,S,Hq*D], present_k and present_v [B,Hkv,C,D].
# Sequence b holds kv_len[b] rows. The S new ones are written behind them, and new query s sees the rows
# 0 .. kv_len[b]+s. past_extent is never read: it tells a plugin's host code P, which sees only shapes.
_KV_ATTENTION_BODY = """
<domain: "ai.starkv", opset_import: ["" : 23]>
KVAttention <num_heads, kv_num_heads> (q, k, v, past_k, past_v, kv_len, past_extent)
    => (out, present_k, present_v)
{
    num_q = Constant <value_int: int = @num_heads> ()
    num_kv = Constant <value_int: int = @kv_num_heads> ()
    axes_0 = Constant <value_ints = [0]> ()
    axes_123 = Constant <value_ints = [1, 2, 3]> ()
    keep_two = Constant <value_ints = [0, 0]> ()
    infer = Constant <value_ints = [-1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()

    num_q_1d = Unsqueeze (num_q, axes_0)
    num_kv_1d = Unsqueeze (num_kv, axes_0)
    q_shape = Concat <axis = 0> (keep_two, num_q_1d, infer)
    kv_shape = Concat <axis = 0> (keep_two, num_kv_1d, infer)
    q_rows = Reshape (q, q_shape)
    k_rows = Reshape (k, kv_shape)
    v_rows = Reshape (v, kv_shape)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_rows)
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k_rows)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_rows)

    new_1d = Shape <start = 1, end = 2> (q)
    new = Squeeze (new_1d, axes_0)
    capacity_1d = Shape <start = 2, end = 3> (past_k)
    capacity = Squeeze (capacity_1d, axes_0)
    new_index = Range (zero, new, one)
    cache_row = Range (zero, capacity, one)
    start = Cast <to = 7> (kv_len)
    start_4d = Unsqueeze (start, axes_123)
    rows_axes = Constant <value_ints = [0, 1, 3]> ()
    new_index_4d = Unsqueeze (new_index, rows_axes)
    row = Add (start_4d, new_index_4d)

    kv_extent = Shape (k_heads)
    write_row = Expand (row, kv_extent)
    present_k = ScatterElements <axis = 2> (past_k, write_row, k_heads)
    present_v = ScatterElements <axis = 2> (past_v, write_row, v_heads)

    visible = LessOrEqual (cache_row, row)
    attended = Attention (q_heads, present_k, present_v, visible)
    attended_rows = Transpose <perm = [0, 2, 1, 3]> (attended)
    out_shape = Concat <axis = 0> (keep_two, infer)
    out = Reshape (attended_rows, out_shape)
}
"""

# q, k, v [1,N,H*D] -> out [1,N,H*D]: every token sees every token.
_FULL_ATTENTION_BODY = """
<domain: "ai.starkv", opset_import: ["" : 23]>
FullAttention <num_heads> (q, k, v) => (out)
{
    out = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads> (q, k, v)
}
"""


def standard_functions() -> dict[str, onnx.FunctionProto]:
    """Return the operators' definitions in standard ONNX operators, by name."""
    bodies = (_KV_ATTENTION_BODY, _FULL_ATTENTION_BODY)
    functions = [onnx.parser.parse_function(body) for body in bodies]
    return {function.name: function for function in functions}
