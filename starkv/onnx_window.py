# SPDX-License-Identifier: Apache-2.0
"""ONNX definitions of the scores that a prompt's last queries give. See ``onnx_compress.py`` for the symbols
and ``methods/window.py`` for the meaning."""

from starkv.methods.star_kv_config import Pooling

_HEADER = '<domain: "ai.starkv", opset_import: ["" : 23, "ai.starkv" : 1]>'
_POOL = {
    "avgpool": """
    summed = ReduceSum <keepdims = 0> (attention, axis_2)
    mean_mass = Div (summed, sharing)
    past_mass = Where (is_past, mean_mass, nothing)
    spread = AveragePool <count_include_pad = 1, kernel_shape = [{kernel}], pads = [{pad}, {pad}]> (past_mass)
""",
    "maxpool": """
    batch = Shape <start = 0, end = 1> (k)
    score_shape = Concat <axis = 0> (batch, infer, window_1d, capacity_1d)
    by_head = Reshape (attention, score_shape)
    mass = ReduceSum <keepdims = 0> (by_head, axis_2)
    past_mass = Where (is_past, mass, nothing)
    pooled_mass = MaxPool <kernel_shape = [{kernel}], pads = [{pad}, {pad}]> (past_mass)
    pooled_shape = Concat <axis = 0> (batch_groups, infer, capacity_1d)
    by_group = Reshape (pooled_mass, pooled_shape)
    spread = ReduceMean <keepdims = 0> (by_group, axis_2)
""",
}
"""Averaging commutes with the mean over a group's heads, so it runs on the few groups instead of the many
heads."""

# k [B,G,C,D], q [B,G,R,D] (R = H / G * W: queries of a group, head after head), window [1] i64, kv_len [B]
# i32 -> pooled [B,G,C]: attention mass of the window, pooled along the rows, mean over the heads of each
# group. Only the last columns hold rows that some query doesn't see. They are worked out once more, masked
# and written over the others: a mask over all scores would cost as much as their softmax, and with a single
# reader the scores are overwritten in place.
_WINDOW_SCORES_BODY = """
{header}
WindowScores (k, q, window_1d, kv_len) => (pooled)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_1 = Constant <value_ints = [1]> ()
    axes_12 = Constant <value_ints = [1, 2]> ()
    axis_2 = Constant <value_ints = [2]> ()
    axis_3 = Constant <value_ints = [3]> ()
    infer = Constant <value_ints = [-1]> ()
    hidden_score = Constant <value = float {{-inf}}> ()
    nothing = Constant <value_float = 0.0> ()

    dim = Shape <start = 3, end = 4> (k)
    dim_f32 = Cast <to = 1> (dim)
    root = Sqrt (dim_f32)
    scale = Reciprocal (root)
    grouped = Mul (q, scale)
    batch_groups = Shape <start = 0, end = 2> (k)
    k_transposed = Transpose <perm = [0, 1, 3, 2]> (k)
    products = MatMul (grouped, k_transposed)

    capacity_1d = Shape <start = 2, end = 3> (k)
    capacity = Squeeze (capacity_1d)
    window = Squeeze (window_1d)
    query = Range (zero, window, one)
    length = Cast <to = 7> (kv_len)
    past = Sub (length, window_1d)
    past_3d = Unsqueeze (past, axes_12)
    query_2d = Unsqueeze (query, axis_1)
    last_seen = Add (past_3d, query_2d)
    least_past = ReduceMin <keepdims = 0> (past)
    tail_start = Max (least_past, zero)
    tail_start_1d = Reshape (tail_start, infer)
    tail_row = Range (tail_start, capacity, one)
    tail_seen = LessOrEqual (tail_row, last_seen)
    tail_seen_5d = Unsqueeze (tail_seen, axes_12)
    tail_k = Slice (k, tail_start_1d, capacity_1d, axis_2)
    tail_k_transposed = Transpose <perm = [0, 1, 3, 2]> (tail_k)
    tail_products = MatMul (grouped, tail_k_transposed)
    per_query = Shape <start = 0, end = 3> (products)
    tail_rows_count = Shape (tail_row)
    by_head_shape = Concat <axis = 0> (batch_groups, infer, window_1d, tail_rows_count)
    tail_by_head = Reshape (tail_products, by_head_shape)
    tail_visible = Where (tail_seen_5d, tail_by_head, hidden_score)
    tail_shape = Concat <axis = 0> (per_query, tail_rows_count)
    tail_scores = Reshape (tail_visible, tail_shape)
    tail_rows = Expand (tail_row, tail_shape)
    visible = ScatterElements <axis = 3> (products, tail_rows, tail_scores)
    attention = Softmax <axis = -1> (visible)

    row = Range (zero, capacity, one)
    is_past = Less (row, past_3d)
    queries = Shape <start = 2, end = 3> (q)
    sharing_i64 = Div (queries, window_1d)
    sharing = Cast <to = 1> (sharing_i64)
    {pool}
    pooled = Where (is_past, spread, nothing)
}}
"""

# k [L,B,G,C,D], q_window [L,B,H,W,D], kv_len [L,B] -> group_scores [L,B,G,C].
_SCORE_WINDOW_BODY = """
{header}
ScoreWindow (k, q_window, kv_len) => (group_scores)
{{
    outer = Shape <start = 0, end = 3> (k)
    infer = Constant <value_ints = [-1]> ()
    dim = Shape <start = 4, end = 5> (k)
    window = Shape <start = 3, end = 4> (q_window)
    grouped_shape = Concat <axis = 0> (outer, infer, dim)
    grouped = Reshape (q_window, grouped_shape)
    group_scores = Scan <num_scan_inputs = 3, body = layer
        (float[B,G,C,D] k_l, float[B,G,R,D] q_l, int32[B] len_l) => (float[B,G,C] groups_l)
        {{
            groups_l = ai.starkv.WindowScores (k_l, q_l, window, len_l)
        }}
    > (k, grouped, kv_len)
}}
"""


def bodies(pooling: Pooling, kernel: int) -> tuple[str, str]:
    """Texts of ``WindowScores`` and ``ScoreWindow``."""
    pool = _POOL[pooling].format(kernel=kernel, pad=kernel // 2)
    return _WINDOW_SCORES_BODY.format(header=_HEADER, pool=pool), _SCORE_WINDOW_BODY.format(header=_HEADER)
