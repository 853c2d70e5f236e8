# SPDX-License-Identifier: Apache-2.0
"""ONNX definitions of STaR-KV's scoring. See ``onnx_compress.py`` for the symbols and ``methods/star_kv.py``
for the meaning of every stage."""

from dataclasses import fields

from starkv.methods.expected_information import SPATIAL_BINS, VALUE_BINS
from starkv.methods.star_kv_config import Pooling
from starkv.methods.star_kv_plan import StarKVPlan

_PLACES = SPATIAL_BINS * SPATIAL_BINS
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
_PARAMETERS = ", ".join(f"p_{field.name}" for field in fields(StarKVPlan))

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

# All of STaR-KV behind the window's attention, for all layers together. pooled [L,B,G,C], window [1] i64, the others
# as in ScoreStarKV.
_STAGES_BODY = """
{header}
StarKVStages (pooled, window, hidden_norm, kv_len, row_meta, frame, parameters,
              mi_ema, pattern_ema, temperature)
    => (scores, stages, needed, new_mi_ema, new_pattern_ema, new_temperature)
{{
    {parameters} = Split <axis = 0, num_outputs = {count}> (parameters)
    frame_i64 = Cast <to = 7> (frame)
    f_index, f_to_end, f_cells, f_rows, f_columns = Split <axis = 0, num_outputs = 5> (frame_i64)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zero_1d = Constant <value_ints = [0]> ()
    axis_2 = Constant <value_ints = [2]> ()
    axis_3 = Constant <value_ints = [3]> ()
    last = Constant <value_ints = [-1]> ()
    to_the_end = Constant <value_ints = [9223372036854775807]> ()
    f0 = Constant <value_float = 0.0> ()
    f1 = Constant <value_float = 1.0> ()
    tiny_8 = Constant <value_float = 1e-8> ()
    hidden_score = Constant <value = float {{-inf}}> ()

    frame_column = Constant <value_int = 0> ()
    row_frame = Gather <axis = 3> (row_meta, frame_column)
    capacity_1d = Shape <start = 3, end = 4> (pooled)
    capacity = Squeeze (capacity_1d)
    row = Range (zero, capacity, one)
    length = Cast <to = 7> (kv_len)
    past = Sub (length, window)
    past_3d = Unsqueeze (past, axis_2)
    is_past = Less (row, past_3d)
    start = Sub (length, f_to_end)
    start_3d = Unsqueeze (start, axis_2)
    offset = Sub (row, start_3d)
    from_start = GreaterOrEqual (offset, zero_1d)
    before_end = Less (offset, f_cells)
    in_frame = And (from_start, before_end)

    cells_f32 = Cast <to = 1> (f_cells)
    count = Max (cells_f32, f1)
    inside_norm = Where (in_frame, hidden_norm, f0)
    norm_sum = ReduceSum <keepdims = 1> (inside_norm, last)
    norm_mean = Div (norm_sum, count)
    from_mean = Sub (hidden_norm, norm_mean)
    deviation = Where (in_frame, from_mean, f0)
    squares = Mul (deviation, deviation)
    square_sum = ReduceSum <keepdims = 1> (squares, last)
    less_one = Sub (cells_f32, f1)
    freedom = Max (less_one, f1)
    variance = Div (square_sum, freedom)
    spread = Sqrt (variance)
    spread_eps = Add (spread, tiny_8)
    z = Div (deviation, spread_eps)
    z_tempered = Div (z, p_boost_temperature)
    logits = Where (in_frame, z_tempered, hidden_score)
    shares = Softmax <axis = -1> (logits)
    mass = Mul (shares, p_boost)
    boost = Where (in_frame, mass, f0)
    boost_4d = Unsqueeze (boost, axis_2)
    groups = Add (pooled, boost_4d)

    outer = Shape <start = 0, end = 3> (pooled)
    group_count = Shape <start = 2, end = 3> (pooled)
    base = ReduceMean <keepdims = 0> (groups, axis_2)
    plain = ReduceMean <keepdims = 0> (pooled, axis_2)

    base_sum = ReduceSum <keepdims = 1> (base, last)
    base_total = Max (base_sum, tiny_8)
    share = Div (base, base_total)
    share_eps = Add (share, tiny_8)
    log_share = Log (share_eps)
    surprise = Mul (share, log_share)
    negative_entropy = ReduceSum <keepdims = 0> (surprise, last)
    entropy = Neg (negative_entropy)
    one_i64 = Constant <value_ints = [1]> ()
    competing = Max (past, one_i64)
    competing_f64 = Cast <to = 11> (competing)
    log_f64 = Log (competing_f64)
    tiny_f64 = Constant <value = double {{1e-8}}> ()
    log_eps = Add (log_f64, tiny_f64)
    largest_entropy = Cast <to = 1> (log_eps)
    normalized = Div (entropy, largest_entropy)
    log_past = Cast <to = 1> (log_f64)
    spread_entropy = Mul (normalized, log_past)
    needed = Exp (spread_entropy)
    range = Sub (p_entropy_max, p_entropy_min)
    above_least = Mul (range, normalized)
    fresh = Add (p_entropy_min, above_least)
    kept_part = Mul (p_entropy_smooth, temperature)
    fresh_weight = Sub (f1, p_entropy_smooth)
    fresh_part = Mul (fresh_weight, fresh)
    new_temperature = Add (kept_part, fresh_part)

    leading = ArgMax <axis = 2, keepdims = 0> (groups)
    cells = Squeeze (f_cells)
    cell = Range (zero, cells, one)
    frame_row = Add (start_3d, cell)
    frame_row_4d = Unsqueeze (frame_row, axis_2)
    inside_shape = Concat <axis = 0> (outer, f_cells)
    frame_rows = Expand (frame_row_4d, inside_shape)
    inside = GatherElements <axis = 3> (groups, frame_rows)
    positive = Relu (inside)

    mi_wanted = Greater (p_mi_enabled, f0)
    new_mi_ema = If (mi_wanted) <
        then_branch = informed () => (averaged)
        {{
            information = ai.starkv.SpatialInformation (positive, f_cells, f_rows, f_columns)
            beyond_chance = Sub (information, p_mi_chance)
            real = Relu (beyond_chance)
            scaled = Mul (real, p_mi_scale)
            old_part = Mul (p_mi_decay, mi_ema)
            new_weight = Sub (f1, p_mi_decay)
            new_part = Mul (new_weight, scaled)
            averaged = Add (old_part, new_part)
        }},
        else_branch = idle () => (unchanged) {{ unchanged = Identity (mi_ema) }}
    >
    least = ReduceMin <keepdims = 1> (new_mi_ema, last)
    greatest = ReduceMax <keepdims = 1> (new_mi_ema, last)
    width = Sub (greatest, least)
    tiny_12 = Constant <value_float = 1e-12> ()
    width_eps = Max (width, tiny_12)
    above = Sub (new_mi_ema, least)
    ratio = Div (above, width_eps)
    half = Constant <value_float = 0.5> ()
    flat = Less (width, tiny_12)
    stretched = Where (flat, half, ratio)
    is_stretched = Greater (p_mi_stretch, f0)
    graded = Where (is_stretched, stretched, new_mi_ema)
    tempered = Div (graded, p_mi_tau)
    learned = Softmax <axis = -1> (tempered)
    groups_f32 = Cast <to = 1> (group_count)
    equal_weight = Reciprocal (groups_f32)
    usable = Greater (p_mi_usable, f0)
    weights = Where (usable, learned, equal_weight)
    own_weight = GatherElements <axis = 2> (weights, leading)
    relative = Mul (own_weight, groups_f32)
    weight_part = Mul (p_mi_weight, relative)
    plain_weight = Sub (f1, p_mi_weight)
    factor = Add (plain_weight, weight_part)
    weighted = Mul (base, factor)

    temporal_wanted = Greater (p_temporal_update, f0)
    discount, new_pattern_ema = If (temporal_wanted) <
        then_branch = compared () => (applied, pattern_after)
        {{
            positive_sum = ReduceSum <keepdims = 1> (positive, last)
            positive_total = Max (positive_sum, tiny_8)
            pattern = Div (positive, positive_total)
            earlier = Slice (pattern_ema, zero_1d, f_cells, axis_3)
            earlier_part = Mul (p_temporal_rho, earlier)
            pattern_weight = Sub (f1, p_temporal_rho)
            pattern_part = Mul (pattern_weight, pattern)
            updated = Add (earlier_part, pattern_part)
            to_earlier = Greater (p_temporal_earlier, f0)
            reference = Where (to_earlier, earlier, updated)
            products = Mul (pattern, reference)
            dot = ReduceSum <keepdims = 0> (products, last)
            pattern_length = ReduceL2 <keepdims = 0> (pattern, last)
            reference_length = ReduceL2 <keepdims = 0> (reference, last)
            pattern_norm = Max (pattern_length, tiny_8)
            reference_norm = Max (reference_length, tiny_8)
            norms = Mul (pattern_norm, reference_norm)
            cosine = Div (dot, norms)
            clipped = Clip (cosine, f0, f1)
            no_pattern = Sub (f1, p_pattern_usable)
            nothing_seen = Mul (p_temporal_earlier, no_pattern)
            seen = Sub (f1, nothing_seen)
            stability = Mul (clipped, seen)

            no_frame = Constant <value = int32 {{0}}> ()
            is_visual = GreaterOrEqual (row_frame, no_frame)
            is_counted = And (is_visual, is_past)
            row_frame_i64 = Cast <to = 7> (row_frame)
            newer = Sub (f_index, row_frame_i64)
            newer_f32 = Cast <to = 1> (newer)
            distance = Where (is_counted, newer_f32, f0)
            own_stability = GatherElements <axis = 2> (stability, leading)
            eps_rest = Sub (f1, p_temporal_eps)
            graded_stability = Mul (eps_rest, own_stability)
            strength = Add (p_temporal_eps, graded_stability)
            way = Mul (distance, strength)
            decay = Neg (p_temporal_delta)
            exponent = Mul (decay, way)
            power = Exp (exponent)
            floor_rest = Sub (f1, p_temporal_floor)
            above_floor = Mul (floor_rest, power)
            lowered = Add (p_temporal_floor, above_floor)
            acts = Greater (p_temporal_apply, f0)
            applied = Where (acts, lowered, f1)
            rest = Slice (pattern_ema, f_cells, to_the_end, axis_3)
            pattern_after = Concat <axis = 3> (updated, rest)
        }},
        else_branch = still () => (untouched, pattern_before)
        {{
            nothing_taken = Mul (base, f0)
            untouched = Add (nothing_taken, f1)
            pattern_before = Identity (pattern_ema)
        }}
    >
    discounted = Mul (weighted, discount)
    exponent_of = Reciprocal (new_temperature)
    exponent_3d = Unsqueeze (exponent_of, axis_2)
    at_least_zero = Relu (discounted)
    sharpened = Pow (at_least_zero, exponent_3d)
    is_sharpened = Greater (p_entropy_power, f0)
    scores = Where (is_sharpened, sharpened, discounted)
    plain_4d = Unsqueeze (plain, axis_2)
    base_4d = Unsqueeze (base, axis_2)
    weighted_4d = Unsqueeze (weighted, axis_2)
    discounted_4d = Unsqueeze (discounted, axis_2)
    stages = Concat <axis = 2> (plain_4d, base_4d, weighted_4d, discounted_4d)
}}
"""

# positive [L,B,G,N] f32 at least 0, cells (N), rows, columns [1] i64 -> information [L,B,G] f32 in nats.
_INFORMATION_BODY = """
{header}
SpatialInformation (positive, cells, rows, columns) => (information)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    bins = Constant <value_int = {bins}> ()
    last_bin = Constant <value_int = {last_bin}> ()
    last = Constant <value_ints = [-1]> ()
    count = Squeeze (cells)
    token = Range (zero, count, one)
    row = Div (token, columns)
    row_start = Mul (row, columns)
    column = Sub (token, row_start)
    row_twice = Mul (row, two)
    column_twice = Mul (column, two)
    row_centre = Add (row_twice, one)
    column_centre = Add (column_twice, one)
    row_times = Mul (row_centre, bins)
    column_times = Mul (column_centre, bins)
    rows_twice = Mul (rows, two)
    columns_twice = Mul (columns, two)
    row_bin_any = Div (row_times, rows_twice)
    column_bin_any = Div (column_times, columns_twice)
    row_bin = Min (row_bin_any, last_bin)
    column_bin = Min (column_bin_any, last_bin)
    row_offset = Mul (row_bin, bins)
    place = Add (row_offset, column_bin)

    values, order = TopK <axis = -1, largest = 0, sorted = 1> (positive, cells)
    ranked_place = Gather <axis = 0> (place, order)
    value_bins = Constant <value_int = {values}> ()
    places = Constant <value_int = {places}> ()
    rank_times = Mul (token, value_bins)
    value_bin = Div (rank_times, cells)
    value_offset = Mul (value_bin, places)
    joint_bin = Add (value_offset, ranked_place)
    outer = Shape <start = 0, end = 3> (positive)
    joint_size = Constant <value_ints = [{joint}]> ()
    joint_shape = Concat <axis = 0> (outer, joint_size)
    empty = ConstantOfShape <value = double[1] {{0.0}}> (joint_shape)
    unit = Constant <value = double {{1.0}}> ()
    bin_shape = Shape (joint_bin)
    ones = Expand (unit, bin_shape)
    counts = ScatterElements <axis = 3, reduction = "add"> (empty, joint_bin, ones)
    table_shape = Constant <value_ints = [0, 0, 0, {values}, {places}]> ()
    table = Reshape (counts, table_shape)
    cells_f64 = Cast <to = 11> (cells)
    joint = Div (table, cells_f64)
    axis_3 = Constant <value_ints = [3]> ()
    axis_4 = Constant <value_ints = [4]> ()
    axes_34 = Constant <value_ints = [3, 4]> ()
    of_value = ReduceSum <keepdims = 1> (joint, axis_4)
    of_place = ReduceSum <keepdims = 1> (joint, axis_3)
    independent = Mul (of_value, of_place)
    tiny = Constant <value = double {{1e-12}}> ()
    joint_eps = Add (joint, tiny)
    independent_eps = Add (independent, tiny)
    log_joint = Log (joint_eps)
    log_independent = Log (independent_eps)
    gain = Sub (log_joint, log_independent)
    terms = Mul (joint, gain)
    sum = ReduceSum <keepdims = 0> (terms, axes_34)
    none = Constant <value = double {{0.0}}> ()
    at_least_none = Max (sum, none)
    found = Cast <to = 1> (at_least_none)
    total = ReduceSum <keepdims = 0> (positive, last)
    least_total = Constant <value_float = 1e-12> ()
    anything = Greater (total, least_total)
    one_1d = Constant <value_ints = [1]> ()
    several = Greater (cells, one_1d)
    usable = And (anything, several)
    f0 = Constant <value_float = 0.0> ()
    information = Where (usable, found, f0)
}}
"""

# k [L,B,G,C,D], q_window [L,B,H,W,D], hidden_norm [L,B,C], kv_len [L,B], row_meta [L,B,C,4], frame [5],
# parameters [P], mi_ema [L,B,G], pattern_ema [L,B,G,V], temperature [L,B]
# -> scores [L,B,C], stages [L,B,4,C], needed [L,B] (rows that a layer's scores are spread over), the new
# state.
_SCORE_BODY = """
{header}
ScoreStarKV (k, q_window, hidden_norm, kv_len, row_meta, frame, parameters, mi_ema, pattern_ema, temperature)
    => (scores, stages, needed, new_mi_ema, new_pattern_ema, new_temperature)
{{
    pooled = ai.starkv.ScoreWindow (k, q_window, kv_len)
    window = Shape <start = 3, end = 4> (q_window)
    scores, stages, needed, new_mi_ema, new_pattern_ema, new_temperature = ai.starkv.StarKVStages
        (pooled, window, hidden_norm, kv_len, row_meta, frame, parameters, mi_ema, pattern_ema, temperature)
}}
"""


def bodies(pooling: Pooling, kernel: int) -> tuple[str, ...]:
    """Texts of all functions, those that are called before those that call them."""
    pool = _POOL[pooling].format(kernel=kernel, pad=kernel // 2)
    return (
        _WINDOW_SCORES_BODY.format(header=_HEADER, pool=pool),
        _INFORMATION_BODY.format(
            header=_HEADER,
            bins=SPATIAL_BINS,
            last_bin=SPATIAL_BINS - 1,
            values=VALUE_BINS,
            places=_PLACES,
            joint=VALUE_BINS * _PLACES,
        ),
        _SCORE_WINDOW_BODY.format(header=_HEADER),
        _STAGES_BODY.format(header=_HEADER, parameters=_PARAMETERS, count=len(fields(StarKVPlan))),
        _SCORE_BODY.format(header=_HEADER),
    )
